"""LoRA factors at full shapes, and the adapter directory."""
