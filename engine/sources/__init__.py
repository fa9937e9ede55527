"""Where models and data come from, and what their files must be, without torch."""
