"""LoRA on named layers, and PEFT's files."""
