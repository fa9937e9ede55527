"""Define the commands to a running sweep, the files that carry them, and what they ask for."""
