"""Compute the matmuls of frozen NF4 weights in eight bits, in Triton, and define each operation in plain torch."""
