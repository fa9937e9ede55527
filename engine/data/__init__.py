"""Samples to packed rows, with the tokens that carry loss."""
