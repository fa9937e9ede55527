"""Compute attention over packed samples in Triton, where torch has no kernel for it or a slower one."""
