"""Models in memory: narrow layers, quantization. The door to transformers."""
