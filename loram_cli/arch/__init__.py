"""Which tensor is what, as data."""
