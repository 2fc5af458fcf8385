"""Autoencoders with codebooks: what neural tokenizers are composed of."""
