"""Encoder-decoders: two lists of layers, and what the encoder reads as columns of a batch."""
