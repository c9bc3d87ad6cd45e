"""What to keep: plans, groups, scores and slices, tensors only."""
