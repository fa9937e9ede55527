"""Show a sweep on one HTML page."""
