"""Networks, and how each is hollowed."""
