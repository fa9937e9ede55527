"""What any program needs of the machine: whole files, locks, signals, limits."""
