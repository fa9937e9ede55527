"""What the terminal shows and completes."""
