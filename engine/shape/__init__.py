"""Describe what a model's layers are, and what a config makes of each of them, without torch."""
