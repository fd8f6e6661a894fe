"""The order of training samples, and reading them."""
