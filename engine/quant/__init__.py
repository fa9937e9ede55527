"""Frozen weights in 4 bits; the only door to bitsandbytes."""
