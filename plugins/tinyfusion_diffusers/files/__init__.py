"""Files of weights: folders of diffusers, single files in the names of their publishers, GGUF."""
