"""Encodes folders of images to shards of latents."""
