"""Model learning curves, and choose which trial trains next."""
