"""engine: train one QLoRA adapter on one GPU (or CPU). Knows nothing of sweeps; importing this package loads no torch."""

__version__ = "0.1.0"
