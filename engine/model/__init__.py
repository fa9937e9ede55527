"""Load the base model once and lend it to one trial after another."""
