"""Define a trial's record, outcome and objectives, and choose the winner."""
