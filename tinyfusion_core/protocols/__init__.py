"""Interfaces that plugins implement: backbone, loss, data, command; and the task made of them."""
