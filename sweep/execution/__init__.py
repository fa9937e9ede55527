"""Run trials under Ray Tune, and train them in worker processes."""
