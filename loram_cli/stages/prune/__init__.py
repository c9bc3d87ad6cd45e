"""Prune: a small model of the base, made once."""
