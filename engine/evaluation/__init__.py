"""What a base model or an adapter is worth on the fixed samples."""
