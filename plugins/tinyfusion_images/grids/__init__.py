"""Images beside each other in one file."""
