"""The sweep folder: every path, whole files only."""
