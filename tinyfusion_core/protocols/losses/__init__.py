"""Objectives of a kind."""
