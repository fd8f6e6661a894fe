"""Encoders of transformers: masked language models and sentence encoders."""
