"""Which fields vary, over what."""
