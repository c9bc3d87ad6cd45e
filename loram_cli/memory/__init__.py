"""Parameter and memory accounting: arithmetic alone."""
