"""Choose how a card computes a config, and predict the time it takes, without torch."""
