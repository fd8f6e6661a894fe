"""Learning under sampled masks: the objective of a search, and weights that many masks share."""
