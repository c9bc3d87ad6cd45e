"""LoRA factors to full shapes, on tensors alone."""
