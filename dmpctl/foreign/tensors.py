"""Tensors in files of other people: pickles that are read without running any of them, and numbers that a layer can take.

`torch.load(weights_only=True)` builds nothing but the classes on its list. This one adds numpy's arrays and numbers under the
names of numpy 1 and 2, and the usual config classes *by name*, each mapped to something inert: no such package is imported, and
none of its `__setstate__` or `__reduce__` is ever called.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor

from dmpctl.errors import IntegrityError, MissingError


class Inert:
    """Stands for an object of any class: keeps what was pickled with it. No __dict__, so nothing can shadow its methods."""

    __slots__ = ("state",)
    state: Any

    def __new__(cls, *arguments: object) -> "Inert":
        made = super().__new__(cls)
        made.state = None
        return made

    def __setstate__(self, state: object) -> None:
        self.state = state


def _empty(*arguments: object) -> dict[Any, Any]:
    """Stands for a call that makes a dictionary."""
    return {}


def _number(dtype: Any, data: bytes) -> object:
    """A number that numpy pickled, as Python's own; ValueError for what holds objects."""
    return np.frombuffer(data, dtype)[0].item()


_OBJECTS = (
    *("argparse.Namespace", "types.SimpleNamespace"),
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in ("Path", "PosixPath", "PurePosixPath")),
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in ("WindowsPath", "PureWindowsPath")),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *(f"omegaconf.base.{kind}" for kind in ("ContainerMetadata", "Metadata", "UnionNode")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path", "Enum")),
    *(f"ml_collections.config_dict.config_dict.{kind}" for kind in ("ConfigDict", "FrozenConfigDict", "FieldReference")),
    *(f"builtins.{kind}" for kind in ("dict", "list", "tuple", "str", "int", "float", "bool")),  # types named, never called
    "typing.Any",
)
_DICTIONARIES = (  # subclasses of dict: torch fills nothing but a dict or an OrderedDict
    *("easydict.EasyDict", "addict.addict.Dict", "munch.Munch"),
    *("yacs.config.CfgNode", "fvcore.common.config.CfgNode", "detectron2.config.config.CfgNode"),
    *("mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict"),
    *("lightning_fabric.utilities.data.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"),
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # of numpy 1 and 2
_DTYPES = (
    "Bool",
    "Str",
    "Float16",
    "Float32",
    "Float64",
    *(f"{sign}{bits}" for sign in ("Int", "UInt") for bits in (8, 16, 32, 64)),
)
ALLOWED: list[Any] = [  # for torch.serialization.safe_globals: what is built, and its name in the pickle
    *((Inert, name) for name in _OBJECTS),
    *((OrderedDict, name) for name in _DICTIONARIES),
    (_empty, "collections.defaultdict"),
    *(
        (function, f"{module}.{name}")
        for module in _NUMPY
        for function, name in (
            (_number, "scalar"),
            (multiarray._reconstruct, "_reconstruct"),
        )
    ),
    *(np.ndarray, np.dtype),
    *(getattr(np.dtypes, f"{name}DType") for name in _DTYPES),
]


def unpickled(path: Path, what: str = "checkpoint", hint: str = "ask for a .safetensors file") -> Any:
    """Returns the content of a PyTorch file, on the CPU: tensors, plain values, numpy's arrays; a config of any class inert.

    MissingError if there is no such file; IntegrityError, with `hint`, for one that is damaged or wants code to be run, and so is
    no readable `what`.
    """
    if not path.is_file():
        raise MissingError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything: IndexError, struct.error, AssertionError, ...
        said = str(error)
    why = "it is damaged, or no PyTorch file"
    if wants := re.search(r"GLOBAL ([\w.]+)|unrecognized function (?:<built-in function |<function |<class ')?([\w.]+)", said):
        why = f"it holds more than tensors ({wants[1] or wants[2]}) and was not loaded"
    elif "TorchScript" in said:
        why, hint = "it is a program of TorchScript, and none is run", "save the state dict of the model alone"
    raise IntegrityError(f"{path} is not a readable {what}: {why}", hint)


def refuse_unsound(tensors: Mapping[str, Tensor], where: object, floats: bool = True) -> None:
    """IntegrityError, with the name, for a tensor that no layer can take.

    It holds NaN or infinity, even once it is float32; or, where all are `floats`, whole or complex numbers; or it is no array of
    its own: sparse, without values, or one number repeated by strides.
    """
    for name, tensor in tensors.items():
        wrong = None
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
            wrong = "is no plain array of numbers"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            wrong = "repeats numbers by strides"
        elif tensor.is_floating_point():
            bad = int((~tensor.float().isfinite()).sum())
            wrong = f"holds {bad} numbers that are not finite in float32" if bad else None
        elif floats or tensor.is_complex():
            wrong = f"holds {str(tensor.dtype).removeprefix('torch.')}, where real numbers are needed"
        if wrong is not None:
            raise IntegrityError(f"{where}: its tensor {name} {wrong}", "take another checkpoint, or copy this one again")
