"""What a plugin implements, and how it is found: backbone, loss, data, hooks, registry, task."""
