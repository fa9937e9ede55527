"""Trials under Ray Tune, and the process that trains them."""
