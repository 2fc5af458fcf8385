"""Quantization: tensors in, tensors out; no files, no progress bars."""
