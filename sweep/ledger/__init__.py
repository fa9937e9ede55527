"""Keep the state of a running sweep, and decide which trial runs next."""
