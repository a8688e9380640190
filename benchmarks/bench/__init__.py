"""Timings, never asserted: `python -m benchmarks.bench`."""
