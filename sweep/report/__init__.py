"""A sweep on one HTML page; the door to plotly."""
