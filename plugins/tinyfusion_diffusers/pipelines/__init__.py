"""The published pipelines: what their folders hold, and pictures that they make."""
