"""sweep: decides which trials run and which adapter wins. Knows nothing of tensors; importing this package loads no torch, no ray."""
