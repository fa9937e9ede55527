"""Measure speed and memory of whole training steps, ours next to other systems."""
