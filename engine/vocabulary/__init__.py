"""Read the tables of the vocabulary: rows of the input embedding, and the loss over the output head."""
