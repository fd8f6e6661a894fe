"""Which blocks stay: the learned search, criteria, successive halving."""
