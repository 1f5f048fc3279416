"""What the user brings: pictures and prompts."""
