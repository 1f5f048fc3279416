"""Both stages: records, and a LoRA trained on them."""
