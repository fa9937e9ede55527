"""What the sweep knows while it runs, and decides."""
