"""The end: choose, measure again, write out."""
