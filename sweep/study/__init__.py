"""Propose and prune trials with Optuna, and keep the journal of them."""
