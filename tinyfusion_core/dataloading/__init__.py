"""The order of the samples, and reading them."""
