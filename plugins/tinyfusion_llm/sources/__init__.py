"""What data sources of texts have in common."""
