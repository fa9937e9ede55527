"""Score answers against references, by known metrics and by the user's own function."""
