"""LoRAM: train LoRA on a pruned model, recover it for the full one (arXiv 2502.13533)."""

__version__ = "0.1.0"
