"""The one exception that Hollow raises on purpose."""


class HollowError(ValueError):
    """A refusal in one or two sentences: what was wrong with which value, and what to do next."""
