"""What a plugin implements: backbone, loss, data, command; and the task that they make up."""
