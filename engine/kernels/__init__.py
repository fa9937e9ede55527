"""Compute the operations around the matmuls, in Triton, and define each in plain torch."""
