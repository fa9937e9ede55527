"""Benchmarks of whole training steps on random weights of real shapes: `python -m engine.bench --help`."""
