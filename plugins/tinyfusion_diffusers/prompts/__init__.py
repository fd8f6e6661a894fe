"""Encodes prompts to shards of embeddings, by the text encoders of a pipeline."""
