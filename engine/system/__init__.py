"""Give commands and trials the services of the machine: whole files, locks, signals, limits."""
