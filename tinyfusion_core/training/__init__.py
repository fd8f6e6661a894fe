"""The training loop, its objectives, distillation and recovery."""
