"""What a trial is to the sweep: record, outcome, objectives, who wins."""
