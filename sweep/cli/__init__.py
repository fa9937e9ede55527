"""Print a sweep's progress, its help and the shell's completions."""
