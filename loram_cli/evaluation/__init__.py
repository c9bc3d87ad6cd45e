"""Tasks, harness and sandbox. The door to lm-eval."""
