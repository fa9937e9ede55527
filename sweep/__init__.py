"""sweep: decides which trials run and which adapter wins. Knows nothing of tensors; importing it loads no torch, no ray."""
