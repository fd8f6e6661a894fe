"""The layers of a transformers decoder: finding, building and removing them."""
