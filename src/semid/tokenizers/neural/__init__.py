"""The pieces that neural tokenizers are composed of.

An autoencoder, a quantizer (residual or parallel) over codebooks, an update rule for each codebook
(gradient or moving averages), a revival policy, and an initializer. A tokenizer puts them together
in a short file of its own.
"""
