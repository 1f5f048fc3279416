"""The paper's tables again, on the embedded model: `python -m benchmarks.paper --out DIR`."""
