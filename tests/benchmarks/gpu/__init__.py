"""Every figure of this product on one GPU, by one command: ``python tests/benchmarks/gpu``."""
