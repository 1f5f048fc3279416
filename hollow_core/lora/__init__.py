"""A LoRA in a network, and in a file."""
