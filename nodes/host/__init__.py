"""What only ComfyUI knows: its models, conditionings, folders and progress bars, in the terms of hollow_core."""
