"""All that we want to know of a GPU, in one command: `python -m benchmarks.gpu --out DIR`."""
