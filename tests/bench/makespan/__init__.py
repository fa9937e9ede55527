"""This room measures how long whole sweeps take: the same trials through us, and through a process for each trial."""
