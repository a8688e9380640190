"""A package, so that `python -m tests.golden` finds this one and not another `tests` that is installed."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch makes its pool, and for the commands that tests start: workers share the cores
