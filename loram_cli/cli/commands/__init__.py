"""One module per command: its help line, its example, and the stage that it calls."""
