"""Imports run downward only, and what is slow or dangerous stays in its room: read from the source, nothing is run."""

import pytest

from tests.house import (
    FLOOR,
    HEAVY,
    LIGHT,
    MOST_FILES,
    MOST_IN_ALL,
    MOST_LINES,
    all_complaints,
    circle_in,
    complaints,
    double_names,
    import_circle,
    imports_of,
    modules,
    parsed,
    room_of,
    sizes,
    table,
    targets_of,
)


def test_the_package_keeps_to_the_house():
    assert all_complaints() == []


def test_every_room_is_looked_at():
    assert {room_of(module) for module in modules()} == set(FLOOR)


def test_no_imports_run_in_a_circle():
    assert import_circle() is None


def test_no_room_is_too_full():
    for room, (files, lines) in sizes().items():
        assert files <= MOST_FILES, f"{room} holds {files} files: has its idea split?"
        assert lines <= MOST_LINES, f"{room} holds {lines} lines: has its idea split?"


def test_the_house_is_no_larger_than_it_shall_be():
    assert sum(lines for _, lines in sizes().values()) <= MOST_IN_ALL


def test_no_two_things_share_a_name():
    """Files and classes: one word per idea, across rooms too."""
    assert double_names() == {}


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == "a -> b -> c -> a"
    assert targets_of("if TYPE_CHECKING:\n    from dmpctl.a import b", {"dmpctl.a", "dmpctl.a.b"}) == {"dmpctl.a", "dmpctl.a.b"}


def test_the_table_has_a_line_for_each_room():
    lines = table().splitlines()
    assert [line.split()[1] for line in lines[2 : len(FLOOR) + 1]] == sorted(
        set(FLOOR) - {""}, key=lambda room: (FLOOR[room], room)
    )
    assert f"in all {sum(files for files, _ in sizes().values())} {sum(lines for _, lines in sizes().values())}" in " ".join(
        table().split()
    )


def test_help_and_settings_reach_nothing_heavy():
    """Importing a light module runs light modules only, directly and through others."""
    sources = modules()
    tops = {module: [i.module for i in imports_of(parsed(source)) if i.when == "top"] for module, source in sources.items()}
    heavy = []
    for start in (module for module in sources if room_of(module) in LIGHT):
        seen, ahead = {start}, [start]
        while ahead:
            here = ahead.pop()
            for name in tops[here]:
                known = name if name in sources else name.rpartition(".")[0]
                if known in sources and known not in seen:
                    seen.add(known)
                    ahead.append(known)
                elif name.split(".")[0] in HEAVY:
                    heavy.append(f"{start} -> {here} -> {name}")
    assert heavy == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("dmpctl.errors", "from dmpctl.settings.model import Settings", "errors imports settings"),
        ("dmpctl.settings.x", "def f():\n    from dmpctl.data.source import open_source", "settings imports data"),
        ("dmpctl.settings.x", "import torch", "settings imports torch at its top"),
        ("dmpctl.cli.x", "try:\n    from torch import nn\nexcept ImportError:\n    pass", "cli imports torch at its top"),
        ("dmpctl.data.x", "from dmpctl.metrics.moments import features_to_moments", "data imports metrics"),
        ("dmpctl.methods.x", "from dmpctl import models", "methods imports models"),
        ("dmpctl.metrics.features.x", "import dmpctl.codecs.identity", "metrics.features imports codecs"),
        ("dmpctl.training.x", "class A:\n    def f(self):\n        import dmpctl.cli.app", "training imports cli"),
        ("dmpctl.backbones.x", "if TYPE_CHECKING:\n    from dmpctl.models.build import Loaded", "backbones imports models"),
        ("dmpctl.data.x", "import accelerate", "accelerate outside of processes"),
        ("dmpctl.training.x", "def f():\n    import diffusers", "diffusers outside of diffusion"),
        ("dmpctl.training.x", "from rich.table import Table", "rich outside of cli"),
        ("dmpctl.settings.x", "import typer", "typer outside of cli"),
        ("dmpctl.cli.x", "import click", "click"),
        ("dmpctl.training.x", "from .build import Loaded", "relative import"),
        ("dmpctl.attic.x", "", "attic is no room"),
        ("dmpctl.training.x", "torch.load(path)", "torch.load without"),
        ("dmpctl.training.x", "torch.load(path, weights_only=False)", "torch.load without"),
        ("dmpctl.training.x", "x = numpy.load(path, allow_pickle=True)", "np.load with allow_pickle"),
        ("dmpctl.training.x", "pickle.load(file)", "pickle.load"),
        ("dmpctl.training.x", "read = pickle.Unpickler", "pickle.Unpickler"),
        ("dmpctl.training.x", "from pickle import loads", "by its bare name"),
        ("dmpctl.training.x", "from torch import load", "by its bare name"),
        ("dmpctl.training.x", "print(1)", "print"),
    ],
)
def test_the_check_can_fail(module, source, complaint):
    assert any(complaint in found for found in complaints(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "dmpctl.training.x",
            "import torch, accelerate\nfrom dmpctl.data.source import open_source\nfrom dmpctl.models.build import Loaded",
        ),
        ("dmpctl.cli.x", "from dmpctl import __version__\ndef f():\n    from dmpctl.training import patch\n    import torch"),
        ("dmpctl.cli.x", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("dmpctl.files", "from dmpctl.errors import DmpError"),
        ("dmpctl.codecs.x", "def f():\n    from diffusers import AutoencoderKL"),
        (
            "dmpctl.training.x",
            "torch.load(path, weights_only=True)\nnp.load(path)\nnp.load(path, allow_pickle=False)\npickle.UnpicklingError",
        ),
    ],
)
def test_the_check_can_pass(module, source):
    assert complaints(source, module) == []
