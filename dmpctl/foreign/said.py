"""The config that other people's checkpoints carry beside tensors: its plain values, by dotted path."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from dmpctl.foreign.tensors import Inert

Scalar = str | int | float | bool
CONFIG_KEYS = ("config", "cfg", "args", "hparams", "hyper_parameters")  # where a checkpoint keeps it
INNER = ("_content", "_fields", "_val")  # where omegaconf and ml_collections keep the values of a node


def said_by(checkpoint: Mapping[Any, Any]) -> dict[str, Scalar]:
    """The plain values of a checkpoint's config by dotted path, `models.vp.topk`; empty where it carries none."""
    found = next((checkpoint[key] for key in CONFIG_KEYS if key in checkpoint), None)
    return dict(_plain(found, "", set()))


def said_in(metadata: Mapping[str, str]) -> dict[str, Scalar]:
    """The plain values of a config that lies as JSON in a safetensors file's metadata; empty where none does."""
    for key in CONFIG_KEYS:
        with suppress(json.JSONDecodeError, RecursionError):
            found = json.loads(metadata.get(key, "null"))
            if isinstance(found, dict):
                return said_by({key: found})
    return {}


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
