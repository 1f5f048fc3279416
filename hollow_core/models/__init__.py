"""A base model from disk."""
