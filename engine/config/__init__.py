"""One trial as frozen data. No torch."""
