"""Turn dialogues into the tokens that a model reads, and mark those it has to write."""
