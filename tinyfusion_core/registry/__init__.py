"""What plugins bring, by kind and name: the hooks, where plugins are found, and the one table of all their classes."""
