"""Recover: the small factors at the base's shapes, and merged into it."""
