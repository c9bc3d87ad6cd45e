"""Safetensors shards, read and written one tensor at a time."""
