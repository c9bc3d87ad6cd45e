"""Evaluate: score models, or ask them."""
