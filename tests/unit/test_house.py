"""Imports run downward only, and what is slow or dangerous stays in its room: read from the source, nothing is run."""

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dmpctl

PACKAGE = Path(dmpctl.__file__).parent
# The rooms from the ground up: an import goes to a room further left, or to one's own room.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("", "errors", "types", "rng", "files", "words"),
    ("settings",),
    ("processes",),
    ("runs",),
    ("store",),
    ("images", "pages"),
    ("backbones", "methods", "diffusion", "codecs", "data", "batches", "metrics.features"),
    ("metrics",),
    ("models",),
    ("sampling",),
    ("measuring",),
    ("gates", "training"),
    ("studies", "exchange", "reports"),
    ("api",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_FILES, MOST_LINES, MOST_IN_ALL = 12, 1_500, 16_000  # of a room, without its __init__; of the package
HOMES = {
    "accelerate": ("processes", "training"),
    "diffusers": ("diffusion", "backbones", "codecs"),
    "peft": ("methods",),
    "transformers": ("codecs", "metrics"),
    "matplotlib": ("gates", "studies", "reports", "pages"),
    "typer": ("cli",),
    "rich": ("cli",),
}
HEAVY = ("torch", "torchvision", "numpy", "scipy", "sklearn", "PIL", "matplotlib", "accelerate", "diffusers", "timm", "datasets")
LIGHT = ("settings", "cli", "errors", "types", "files", "words", "", "__main__")  # a help page imports these
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
    """`training` for dmpctl.training.patch, "" for the package itself (and the names it defines)."""
    parts = module.split(".")[1:]
    room = "metrics.features" if parts[:2] == ["metrics", "features"] else parts[0] if parts else ""
    return "" if room.startswith("__") and room != "__main__" else room


def complaints(source: str, module: str) -> list[str]:
    """What a module called `module` does that it may not do."""
    tree, room = ast.parse(source), room_of(module)
    if room not in FLOOR:
        return [f"{module}: {room} is no room of the house"]
    return [f"{module}:{line}: {what}" for line, what in (*_imports(tree, room), *_calls(tree))]


def _imports(tree: ast.AST, room: str) -> Iterator[tuple[int, str]]:
    for found in imports_of(tree):
        first = found.module.split(".")[0]
        if found.module.startswith("."):
            yield found.line, "relative import"
        elif first == "dmpctl":
            target = room_of(found.module)
            below = FLOOR.get(target, 99) < FLOOR[room] or FLOOR[room] == FLOOR.get(target, 99) == 0
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
    assert {room_of(module) for module in modules()} == set(FLOOR)


def targets_of(source: str, known: Collection[str]) -> set[str]:
    """Modules of the package that a module imports, wherever the import stands; for type checkers, too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & set(known)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(known)
    return {name for name in found if name != "dmpctl"}


def circle_in(graph: Mapping[str, Collection[str]]) -> str | None:
    """One import circle in words, None if there is none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return None


def test_no_imports_run_in_a_circle():
    sources = modules()
    assert circle_in({module: targets_of(source, sources) for module, source in sources.items()}) is None


def sizes() -> dict[str, tuple[int, int]]:
    """Files and lines of each room."""
    found: dict[str, list[int]] = {}
    for module, source in modules().items():
        files = found.setdefault(room_of(module), [0, 0])
        files[0] += f"dmpctl.{room_of(module)}" != module
        files[1] += len(source.splitlines())
    return {room: (files, lines) for room, (files, lines) in found.items()}


def test_no_room_is_too_full():
    for room, (files, lines) in sizes().items():
        assert files <= MOST_FILES, f"{room} holds {files} files: has its idea split?"
        assert lines <= MOST_LINES, f"{room} holds {lines} lines: has its idea split?"


def test_the_house_is_no_larger_than_it_shall_be():
    assert sum(lines for _, lines in sizes().values()) <= MOST_IN_ALL


def test_no_two_things_share_a_name():
    """Files and classes: one word per idea, across rooms too."""
    files, classes = dict[str, list[str]](), dict[str, list[str]]()
    for module, source in modules().items():
        if not module.endswith(room_of(module) or "dmpctl"):
            files.setdefault(module.rpartition(".")[2], []).append(module)
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(module)
    assert {name: where for name, where in (files | classes).items() if len(where) > 1} == {}


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == "a -> b -> c -> a"
    assert targets_of("if TYPE_CHECKING:\n    from dmpctl.a import b", {"dmpctl.a", "dmpctl.a.b"}) == {"dmpctl.a", "dmpctl.a.b"}


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
