"""Train: LoRA on the small model."""
