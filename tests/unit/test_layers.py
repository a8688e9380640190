"""Imports run downward only, and what is slow or dangerous stays in its room: read from the source, nothing is run."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dmpctl

PACKAGE = Path(dmpctl.__file__).parent
THIRD = ("backbones", "methods", "diffusion", "codecs", "data", "metrics")
LAYERS = {
    "": 0,
    "errors": 0,
    "types": 0,
    "rng": 0,
    "files": 0,
    "settings": 1,
    **dict.fromkeys(THIRD, 2),
    "engine": 3,
    "api": 4,
    "cli": 4,
    "__main__": 5,
}
HOMES = {
    "accelerate": ("engine",),
    "diffusers": ("diffusion", "backbones", "codecs"),
    "peft": ("methods",),
    "transformers": ("codecs", "metrics"),
    "typer": ("cli",),
    "rich": ("cli",),
}
HEAVY = ("torch", "torchvision", "numpy", "scipy", "sklearn", "PIL", "matplotlib", "accelerate", "diffusers", "timm", "datasets")
LIGHT = ("settings", "cli", "errors", "types", "files", "", "__main__")  # a help page imports these
UNPICKLERS = ("load", "loads", "Unpickler")


@dataclass(frozen=True)
class Import:
    """One imported module, dotted. `when`: "top" (runs with the module), "typing" or "inside" a function."""

    module: str
    line: int
    when: str


def imports_of(tree: ast.AST, when: str = "top") -> Iterator[Import]:
    """All imports of a module, wherever they stand."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "dmpctl" else [base]
            yield from (Import(name, node.lineno, when) for name in names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_of(node, "inside")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports_of(node, "typing")
        else:
            yield from imports_of(node, when)


def room_of(module: str) -> str:
    """`engine` for dmpctl.engine.build, "" for the package itself (and the names it defines)."""
    room = module.split(".")[1] if "." in module else ""
    return "" if room.startswith("__") and room != "__main__" else room


def complaints(source: str, module: str) -> list[str]:
    """What a module called `module` does that it may not do."""
    tree, room = ast.parse(source), room_of(module)
    if room not in LAYERS:
        return [f"{module}: {room} is no room of the house"]
    return [f"{module}:{line}: {what}" for line, what in (*_imports(tree, room), *_calls(tree))]


def _imports(tree: ast.AST, room: str) -> Iterator[tuple[int, str]]:
    for found in imports_of(tree):
        first = found.module.split(".")[0]
        if found.module.startswith("."):
            yield found.line, "relative import"
        elif first == "dmpctl":
            target = room_of(found.module)
            below = LAYERS.get(target, 9) < LAYERS[room] or (LAYERS[room] == 0 and LAYERS.get(target, 9) == 0)
            names = found.when == "typing" and (room, target) == ("", "api")  # what the package offers, for type checkers
            if target != room and not below and not names:
                yield found.line, f"{room or 'the package'} imports {target}"
        elif first in HOMES and room not in HOMES[first]:
            yield found.line, f"{first} outside of {', '.join(HOMES[first])}"
        if found.when == "top" and first in HEAVY and room in LIGHT:
            yield found.line, f"{room or 'the package'} imports {first} at its top"
        if first == "click":
            yield found.line, "click"


def _calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch", "numpy"):
            if {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}:
                yield node.lineno, f"load imported from {node.module} by its bare name"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr in UNPICKLERS:
            yield node.lineno, f"pickle.{node.attr}"
        elif isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            match ast.unparse(node.func):
                case "torch.load" if given.get("weights_only") != "True":
                    yield node.lineno, "torch.load without weights_only=True"
                case "np.load" | "numpy.load" if given.get("allow_pickle", "False") != "False":
                    yield node.lineno, "np.load with allow_pickle"
                case "print" | "eval" | "exec" as name:
                    yield node.lineno, name


def modules() -> dict[str, str]:
    """Every module of the package with its source."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("dmpctl", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path.read_text("utf-8")
    return found


def test_the_package_keeps_to_the_house():
    found = [complaint for module, source in modules().items() for complaint in complaints(source, module)]
    assert found == []


def test_every_room_is_looked_at():
    assert {room_of(module) for module in modules()} == set(LAYERS)


def test_help_and_settings_reach_nothing_heavy():
    """Whatever runs when a light module is imported, directly or through others, is light."""
    sources = modules()
    tops = {module: [i.module for i in imports_of(ast.parse(source)) if i.when == "top"] for module, source in sources.items()}
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
        ("dmpctl.methods.x", "from dmpctl import engine", "methods imports engine"),
        ("dmpctl.metrics.features.x", "import dmpctl.codecs.identity", "metrics imports codecs"),
        ("dmpctl.engine.x", "class A:\n    def f(self):\n        import dmpctl.cli.app", "engine imports cli"),
        ("dmpctl.backbones.x", "if TYPE_CHECKING:\n    from dmpctl.engine.build import Loaded", "backbones imports engine"),
        ("dmpctl.data.x", "import accelerate", "accelerate outside of engine"),
        ("dmpctl.engine.x", "def f():\n    import diffusers", "diffusers outside of diffusion"),
        ("dmpctl.engine.x", "from rich.table import Table", "rich outside of cli"),
        ("dmpctl.settings.x", "import typer", "typer outside of cli"),
        ("dmpctl.cli.x", "import click", "click"),
        ("dmpctl.engine.x", "from .build import Loaded", "relative import"),
        ("dmpctl.attic.x", "", "attic is no room"),
        ("dmpctl.engine.x", "torch.load(path)", "torch.load without"),
        ("dmpctl.engine.x", "torch.load(path, weights_only=False)", "torch.load without"),
        ("dmpctl.engine.x", "x = numpy.load(path, allow_pickle=True)", "np.load with allow_pickle"),
        ("dmpctl.engine.x", "pickle.load(file)", "pickle.load"),
        ("dmpctl.engine.x", "read = pickle.Unpickler", "pickle.Unpickler"),
        ("dmpctl.engine.x", "from pickle import loads", "by its bare name"),
        ("dmpctl.engine.x", "from torch import load", "by its bare name"),
        ("dmpctl.engine.x", "print(1)", "print"),
    ],
)
def test_the_check_can_fail(module, source, complaint):
    assert any(complaint in found for found in complaints(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "dmpctl.engine.x",
            "import torch, accelerate\nfrom dmpctl.data.source import open_source\nfrom dmpctl.engine.build import Loaded",
        ),
        ("dmpctl.cli.x", "from dmpctl import __version__\ndef f():\n    from dmpctl.engine import patch\n    import torch"),
        ("dmpctl.cli.x", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("dmpctl.files", "from dmpctl.errors import DmpError"),
        ("dmpctl.codecs.x", "def f():\n    from diffusers import AutoencoderKL"),
        (
            "dmpctl.engine.x",
            "torch.load(path, weights_only=True)\nnp.load(path)\nnp.load(path, allow_pickle=False)\npickle.UnpicklingError",
        ),
    ],
)
def test_the_check_can_pass(module, source):
    assert complaints(source, module) == []
