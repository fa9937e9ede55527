"""What this card and host reach, measured for the speed predictions."""
