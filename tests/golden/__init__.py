"""Reference tensors of the published code at fixed seeds, and their check: `python -m tests.golden DIR`."""
