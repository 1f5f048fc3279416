"""Pictures out: on two paths, on one, and those of a class."""
