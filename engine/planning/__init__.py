"""Choose how a card computes a config and predict the memory and time it takes, without torch."""
