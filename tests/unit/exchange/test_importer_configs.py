"""What a checkpoint carries beside tensors: configs of any class are read by name, and nothing of it is ever run."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dmpctl.errors import IntegrityError
from dmpctl.models.patch_files import load_result
from dmpctl.types import ScheduleSpec
from tests.unit.exchange.imported import golden_state, imported, published, saved

# ---- config classes of packages that are not here


class Foreign:
    """Makes classes with the full names of other packages, importable only while it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def kind(self, full: str, base: type = object) -> type:
        module, _, name = full.rpartition(".")
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            dotted = ".".join(parts[:depth])
            if not isinstance(sys.modules.get(dotted), ModuleType):
                self._patch.setitem(sys.modules, dotted, ModuleType(dotted))
        made = type(name, (base,), {"__module__": module, "__setstate__": refuse_to_run})
        setattr(sys.modules[module], name, made)
        return made


def refuse_to_run(self: object, state: object) -> None:
    raise AssertionError("code of the pickle's class was run")


@pytest.fixture
def foreign() -> Iterator[Foreign]:
    with pytest.MonkeyPatch.context() as patch:
        yield Foreign(patch)


def as_omegaconf(value: Any, foreign: Foreign) -> Any:
    """The value in the shape in which omegaconf pickles it: nodes that know their parent and their type."""
    container, metadata, leaf, items = (
        foreign.kind(f"omegaconf.{name}")
        for name in ("dictconfig.DictConfig", "base.ContainerMetadata", "nodes.AnyNode", "listconfig.ListConfig")
    )
    from collections import defaultdict

    def node(value: Any, parent: object, key: object) -> Any:
        kind = container if isinstance(value, dict) else items if isinstance(value, list) else leaf
        made, about = kind(), metadata()
        about.__dict__.update(ref_type=Any, object_type=dict, key=key, flags={}, resolver_cache=defaultdict(dict))
        made.__dict__.update(_metadata=about, _parent=parent, _flags_cache=None)
        if kind is leaf:
            made._val = value
        elif kind is items:
            made._content = [node(part, made, i) for i, part in enumerate(value)]
        else:
            made._content = {k: node(part, made, k) for k, part in value.items()}
        return made

    return node(value, None, None)


def as_dictionaries(value: Any, kind: type) -> Any:
    """Nested dictionaries of a class of their own, with attributes beside the items."""
    if not isinstance(value, dict):
        return value
    made = kind((k, as_dictionaries(part, kind)) for k, part in value.items())
    made.__dict__.update(made)
    return made


def as_ml_collections(value: Any, kind: type) -> Any:
    if not isinstance(value, dict):
        return value
    made = kind()
    made.__dict__.update(_fields={k: as_ml_collections(part, kind) for k, part in value.items()}, _locked=True)
    return made


CONFIGS: dict[str, Callable[[dict[str, Any], Foreign], Any]] = {
    "plain": lambda value, _: value,
    "namespace": lambda value, _: Namespace(
        **value["models"]["vp"], **value["models"]["param"], vp_type="add", schedule_name="cosine", results=Path()
    ),
    "simple namespace": lambda value, _: SimpleNamespace(inner=Namespace(general=value["general"], models=value["models"])),
    "omegaconf": lambda value, foreign: as_omegaconf(value | {"list": [1, "a"]}, foreign),
    "easydict": lambda value, foreign: as_dictionaries(value, foreign.kind("easydict.EasyDict", dict)),
    "yacs": lambda value, foreign: as_dictionaries(value, foreign.kind("yacs.config.CfgNode", dict)),
    "ml_collections": lambda value, foreign: as_ml_collections(
        value, foreign.kind("ml_collections.config_dict.config_dict.ConfigDict")
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_config_says_is_used_whatever_class_holds_it(tmp_path, foreign, kind):
    state, about = golden_state("class-topk")
    path = saved(tmp_path / "a.pt", {"model": state, "config": CONFIGS[kind](published(about), foreign)})
    foreign._patch.undo()
    report = imported(path, tmp_path / "run")
    assert report.data["assumed"] == []
    method, config = report.data["method"], report.data["config"]
    assert (method["gate"], method["topk"], method["position"], config["num_heads"]) == ("topk", 8, "add", 4)
    assert report.data["schedule"] == {"kind": "cosine", "steps": 1000}
    assert load_result(tmp_path / "run").backbone.spec.schedule == ScheduleSpec("cosine")


# ---- hostile files


class Malicious:
    """Unpickling this runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (self.command,)


PLACES: dict[str, Callable[[Any], Any]] = {
    "config": lambda bad: {"config": bad},
    "inside": lambda bad: {"config": Namespace(models={"vp": {"topk": bad}})},
    "optimizer": lambda bad: {"opt": {"state": {0: bad}}},
    "list": lambda bad: {"config": {"a": [1, (2, bad)]}},
}


@pytest.mark.parametrize("place", PLACES)
def test_no_code_of_a_pickle_is_run(tmp_path, place):
    state, _ = golden_state("uncond-soft")
    marker = tmp_path / "marker"
    path = saved(tmp_path / "a.pt", {"model": state, **PLACES[place](Malicious(f"touch '{marker}'"))})
    with pytest.raises(IntegrityError, match=rf"holds more than tensors \({os.system.__module__}\.system\)") as caught:
        imported(path, tmp_path / "run", import_heads=4)
    assert caught.value.exit_code == 4
    assert not marker.exists()
    assert not (tmp_path / "run").exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have


def test_a_class_that_is_not_on_the_list_is_named(tmp_path, foreign):
    state, _ = golden_state("uncond-soft")
    path = saved(tmp_path / "a.pt", {"model": state, "config": foreign.kind("somewhere.config.Config")()})
    with pytest.raises(IntegrityError, match=r"somewhere\.config\.Config"):
        imported(path, tmp_path / "run", import_heads=4)


def test_a_value_that_refers_to_another_is_that_one(tmp_path, foreign):
    state, about = golden_state("uncond-soft")
    config = published(about)
    config["models"]["vp"] |= {"topk": "${general.topk}", "type": "${general.nowhere}"}
    path = saved(tmp_path / "a.pt", {"model": state, "config": as_omegaconf(config, foreign)})
    report = imported(path, tmp_path / "run")
    assert report.data["method"]["topk"] == 4  # a quarter of 16
    assert len(report.data["assumed"]) == 1
    assert "--position" in report.data["assumed"][0]


def test_a_run_that_was_moved_finds_its_backbone(tmp_path):
    state, about = golden_state("uncond-soft")
    imported(saved(tmp_path / "a.pt", {"model": state, "config": published(about)}), tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert load_result(tmp_path / "moved").patch is not None


def test_a_config_that_holds_itself_ends(tmp_path):
    state, about = golden_state("uncond-soft")
    config = published(about)
    config["models"]["again"] = config
    assert imported(saved(tmp_path / "a.pt", {"model": state, "config": config}), tmp_path / "run").data["assumed"] == []
