"""The one training loop, what it minimises, and recovery."""
