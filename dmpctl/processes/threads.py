"""How many threads of a CPU a model computes with: those of a tiny one wait for each other longer than they compute."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TINY = 1_000_000  # parameters: below it one thread does as much as two or more, on cores that others use, too (docs/speed.md)
_given = False  # whether --threads was


def use_threads(count: int) -> None:
    """So many, whatever is computed."""
    global _given
    _given = True
    torch.set_num_threads(count)


@contextmanager
def threads_for(parameters: int) -> Iterator[None]:
    """One thread for a model of so few parameters; --threads and OMP_NUM_THREADS come first, and torch obeys them."""
    before = torch.get_num_threads()
    if parameters < TINY and not _given and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
