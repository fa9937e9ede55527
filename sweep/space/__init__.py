"""Describe which fields vary, and over which values."""
