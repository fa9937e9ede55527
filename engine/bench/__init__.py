"""How fast and how large whole steps are, beside their peers."""
