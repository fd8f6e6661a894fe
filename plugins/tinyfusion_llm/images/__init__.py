"""Images beside text: as data, and as columns of a batch."""
