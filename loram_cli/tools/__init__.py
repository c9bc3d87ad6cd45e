"""Commands that read outputs and make none."""
