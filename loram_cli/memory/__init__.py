"""Parameter and memory accounting: arithmetic only."""
