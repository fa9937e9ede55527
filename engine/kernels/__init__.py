"""Operations around the matmuls, with their definition; the only door to Triton."""
