"""Replace a model's own layers with fused ones."""
