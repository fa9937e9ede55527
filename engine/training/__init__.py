"""Train one trial, from its first step to its last report."""
