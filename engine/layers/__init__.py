"""What runs in the place of a model's own layers."""
