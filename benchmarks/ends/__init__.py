"""Which blocks of a transformer to take out, and what has to stand for them."""
