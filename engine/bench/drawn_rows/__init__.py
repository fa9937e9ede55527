"""This room measures memory and speed of trials on random shapes, data and settings."""
