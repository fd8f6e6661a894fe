"""Plans a recipe on the meta device: what would happen, what it needs, and why it cannot run."""
