"""Find models and data, and check their files before anything reads them, without torch."""
