"""The blocks of a network: where they are, what they hand on, how one is called."""
