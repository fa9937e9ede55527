"""The resident base model: loaded once, lent to trial after trial."""
