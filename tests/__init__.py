"""A package, so that `python -m tests.golden` finds this one and not another `tests` that is installed."""
