"""What a recovery begins with, besides the weights that pruning left."""
