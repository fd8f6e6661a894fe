"""What distillation compares, and what it minimises."""
