"""dmpctl: make a converged diffusion transformer better without retraining it."""

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.orig_argv[-len(sys.argv)].removeprefix("-m").startswith("dmpctl"):
    del sys.path[0]  # `python -m dmpctl`: the working directory, whose tokenize.py or torch.py would run

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmpctl.api import apply, load_backbone, load_patch, measure, sample, train

__version__ = "0.1.0"
__all__ = ["__version__", "apply", "load_backbone", "load_patch", "measure", "sample", "train"]


def __getattr__(name: str) -> Any:
    """The names of `dmpctl.api`, imported when they are asked for: `import dmpctl` itself costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'dmpctl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("dmpctl.api"), name)
