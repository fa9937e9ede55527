"""Searches compared: learning curves recorded from real trials, and replays of them."""
