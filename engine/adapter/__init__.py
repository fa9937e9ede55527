"""Put LoRA on named layers, and read and write adapters in PEFT's file format."""
