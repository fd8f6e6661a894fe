"""A teacher's predictions, kept in files, so that distillation runs no teacher."""
