"""Tokenizers: one method a file, behind one contract."""
