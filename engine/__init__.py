"""Train one QLoRA adapter on one GPU or on the CPU. Importing this package loads no torch."""

__version__ = "0.1.0"
