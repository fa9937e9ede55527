"""The adapter for other programs: PEFT, merged, llama.cpp."""
