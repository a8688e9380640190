"""The config that other people's checkpoints carry beside tensors, read without running any of its code.

`torch.load(weights_only=True)` builds nothing but the classes on its list. This one adds the usual config classes *by name*, each
mapped to something inert: no such package is imported, and none of its `__setstate__` or `__reduce__` is ever called.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Scalar = str | int | float | bool
CONFIG_KEYS = ("config", "cfg", "args", "hparams", "hyper_parameters")  # where a checkpoint keeps it
INNER = ("_content", "_fields", "_val")  # where omegaconf and ml_collections keep the values of a node


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
# For torch.serialization.safe_globals: (class that is built, its name in the pickle).
INERT_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((Inert, name) for name in _OBJECTS),
    *((OrderedDict, name) for name in _DICTIONARIES),
    (_empty, "collections.defaultdict"),
]


def said_by(checkpoint: Mapping[Any, Any]) -> dict[str, Scalar]:
    """The plain values of a checkpoint's config by dotted path, `models.vp.topk`; empty where it carries none."""
    found = next((checkpoint[key] for key in CONFIG_KEYS if key in checkpoint), None)
    return dict(_plain(found, "", set()))


def _plain(node: object, path: str, seen: set[int]) -> Iterator[tuple[str, Scalar]]:
    """(dotted path, value) below a node; each container once, so that a config that holds itself ends."""
    if isinstance(node, Scalar):
        yield path, node
    if not isinstance(node, Inert | dict) or id(node) in seen:
        return
    seen.add(id(node))
    fields = _fields(node)
    inner = [fields[key] for key in INNER if key in fields]
    if inner:
        yield from _plain(inner[0], path, seen)
        return
    for key, value in fields.items():
        if isinstance(key, str):
            yield from _plain(value, f"{path}.{key}" if path else key, seen)


def _fields(node: Inert | dict[Any, Any]) -> dict[Any, Any]:
    """The attributes of an object, or the items of a dictionary; read past methods that a pickle may have shadowed."""
    held = node.state if isinstance(node, Inert) else node
    return dict(dict.items(held)) if isinstance(held, dict) else {}


def value_in(said: Mapping[str, Scalar], *names: str) -> Scalar | None:
    """The value whose dotted path is, or ends with, the first of `names` that is there; None: it says nothing.

    What refers to another value (`${general.topk}`, as omegaconf writes it) is that value.
    """
    for name in names:
        for path, value in said.items():
            if path == name or path.endswith("." + name):
                other = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
                return said.get(other[1]) if other else value
    return None
