"""Choose the winner, measure it again and write the results."""
