"""What to keep: plans, groups, scores and slices, on tensors alone."""
