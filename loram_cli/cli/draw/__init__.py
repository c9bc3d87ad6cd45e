"""Draws plans, results and progress on a terminal."""
