"""A training step of Hollow beside other trainers'."""
