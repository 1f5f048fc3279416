"""What a run needs, told before it starts."""
