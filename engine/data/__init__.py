"""Turn samples into packed rows, and mark the tokens that carry loss."""
