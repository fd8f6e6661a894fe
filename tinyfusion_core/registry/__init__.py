"""The registry of plugins: their hooks, where they are found, and the table of all their classes."""
