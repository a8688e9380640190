"""Timings, never asserted: `python -m tests.bench`."""
