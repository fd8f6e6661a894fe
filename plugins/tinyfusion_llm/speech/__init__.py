"""Speech: recordings and what is said in them as data, and the words that a model gets wrong."""
