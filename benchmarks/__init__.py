"""Experiments and timings, each run by hand: `python -m benchmarks.NAME`."""
