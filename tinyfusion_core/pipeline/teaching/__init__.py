"""What a recipe's teacher makes for others to learn from."""
