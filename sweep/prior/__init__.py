"""Say what is known of good settings before the first trial."""
