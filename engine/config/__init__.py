"""One trial as frozen data, without torch."""
