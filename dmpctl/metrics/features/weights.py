"""Weights of extractors, from files that may be hostile: only tensors are unpickled, no code is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from dmpctl.errors import IntegrityError
from dmpctl.files import read_tensors


def read_state_dict(path: Path, hint: str) -> dict[str, Tensor]:
    """State dict of a .safetensors file or of a pickle of plain tensors, on the CPU.

    Raises IntegrityError (with `hint`) for anything but a mapping of names to tensors.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle can raise anything
        raise IntegrityError(f"{path} is not a readable weights file ({one_line(error)})", hint) from None
    if not isinstance(state, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise IntegrityError(f"{path} does not hold a state dict of tensors", hint)
    return dict(state)


def one_line(error: Exception) -> str:
    """What an exception says, short; its kind where it says nothing."""
    return shorten(str(error), 160, placeholder=" ...") or type(error).__name__
