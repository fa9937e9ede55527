"""Optuna: what to try next, what to stop, and the journal of it."""
