"""Plan a sweep before anything starts: check that it fits, and predict what it needs."""
