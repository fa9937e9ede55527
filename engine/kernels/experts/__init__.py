"""Multiply tokens sorted by expert with the packed NF4 weights of their experts."""
