"""Evaluate a base model or an adapter on a fixed set of samples."""
