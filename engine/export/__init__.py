"""Export the adapter for other programs: PEFT, vLLM, transformers and llama.cpp."""
