"""What is settled before anything starts: does it fit, what will it need."""
