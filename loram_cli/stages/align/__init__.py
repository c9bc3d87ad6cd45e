"""Align: bring the small model back towards the base."""
