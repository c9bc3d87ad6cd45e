"""Parse flags, call a stage, draw the result."""
