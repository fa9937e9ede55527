"""How a config will be computed on a card and what that takes, without torch."""
