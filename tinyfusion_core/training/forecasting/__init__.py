"""What a training will come to, from what it has come to."""
