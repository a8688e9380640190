"""The house as it is: rooms, their order and size, read from the source. `python -m tests.house` prints a table of it."""

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import dmpctl

PACKAGE = Path(dmpctl.__file__).parent
# The rooms from the ground up: an import goes to a room further left, or to one's own room.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("", "errors", "types", "rng", "files", "words", "texts", "refusals"),
    ("settings",),
    ("processes",),
    ("runs",),
    ("store",),
    ("images", "pages", "foreign"),
    ("tables",),
    ("backbones", "methods", "diffusion", "codecs", "data", "batches", "metrics.features"),
    ("metrics",),
    ("models",),
    ("sampling",),
    ("measuring",),
    ("comparing",),
    ("gates", "training"),
    ("studies", "exchange", "reports"),
    ("api",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LONG = 60  # lines of a function that are pointed out
MOST_FILES, MOST_LINES = 12, 1_500  # of a room, without its __init__
MOST_IN_ALL = 22_400  # lines of the package, as many as it has with every edge checked; it only falls from here
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
LIGHT = ("settings", "cli", "errors", "types", "files", "words", "texts", "refusals", "", "__main__")  # a help page imports these
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


@cache
def parsed(source: str) -> ast.Module:
    """The syntax tree of a module: the checks ask for the same ones."""
    return ast.parse(source)


def complaints(source: str, module: str) -> list[str]:
    """Returns the rules of the house that a module called `module` breaks."""
    tree, room = parsed(source), room_of(module)
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


@cache
def modules() -> dict[str, str]:
    """Every module of the package with its source."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("dmpctl", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path.read_text("utf-8")
    return found


def targets_of(source: str, known: Collection[str]) -> set[str]:
    """Modules of the package that a module imports, wherever the import stands; for type checkers, too."""
    found = set()
    for node in ast.walk(parsed(source)):
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


def sizes() -> dict[str, tuple[int, int]]:
    """Files and lines of each room."""
    found: dict[str, list[int]] = {}
    for module, source in modules().items():
        files = found.setdefault(room_of(module), [0, 0])
        files[0] += f"dmpctl.{room_of(module)}" != module
        files[1] += len(source.splitlines())
    return {room: (files, lines) for room, (files, lines) in found.items()}


def double_names() -> dict[str, list[str]]:
    """Files and classes that share a name, with the modules where they are. Files are told apart by room, __init__ aside."""
    files, classes = dict[str, list[str]](), dict[str, list[str]]()
    for module, source in modules().items():
        if not module.endswith(room_of(module) or "dmpctl"):
            files.setdefault(module.rpartition(".")[2], []).append(module)
        for node in parsed(source).body:
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(module)
    return {name: where for name, where in (files | classes).items() if len(where) > 1}


def import_circle() -> str | None:
    """One circle of imports between modules of the package, None if there is none."""
    sources = modules()
    return circle_in({module: targets_of(source, sources) for module, source in sources.items()})


def all_complaints() -> list[str]:
    """Every import and call of the package that the house forbids."""
    return [complaint for module, source in modules().items() for complaint in complaints(source, module)]


def loose_dictionaries() -> dict[str, int]:
    """How often each room's signatures and annotations say `dict[str, Any]`, `Mapping[str, Any]` or the like."""
    found = dict.fromkeys(sizes(), 0)
    for module, source in modules().items():
        for node in ast.walk(parsed(source)):
            loose = isinstance(node, ast.Subscript) and ast.unparse(node).endswith("[str, Any]")
            found[room_of(module)] += loose
    return found


def long_functions(most: int) -> dict[str, int]:
    """Functions of more than `most` lines, by dotted name."""
    found = {}
    for module, source in modules().items():
        for node in ast.walk(parsed(source)):
            if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > most:
                found[f"{module}.{node.name}"] = lines
    return found


def table() -> str:
    """Rooms from the ground up with files, lines, longest file and loose dictionaries; then what is amiss, if anything."""
    loose, longest = loose_dictionaries(), dict[str, int]()
    for module, source in modules().items():
        longest[room_of(module)] = max(longest.get(room_of(module), 0), len(source.splitlines()))
    lines = [f"{'floor':>5}  {'room':18}{'files':>6}{'lines':>7}{'longest':>9}{'Any':>5}"]
    known = sizes()
    for room in sorted(known, key=lambda name: (FLOOR.get(name, len(FLOORS)), name)):
        files, count = known[room]
        over = " too full" if files > MOST_FILES or count > MOST_LINES else ""
        floor = FLOOR.get(room, "?")
        lines.append(f"{floor:>5}  {room or '(the package)':18}{files:>6}{count:>7}{longest[room]:>9}{loose[room]:>5}{over}")
    files, count = (sum(column) for column in zip(*known.values(), strict=True))
    most, any_ = max(longest.values()), sum(loose.values())
    lines.append(f"{'':5}  {'in all':18}{files:>6}{count:>7}{most:>9}{any_:>5}  (at most {MOST_IN_ALL} lines)")
    lines.append(f"upward imports and forbidden calls: {'; '.join(all_complaints()) or 'none'}")
    lines.append(f"import circle: {import_circle() or 'none'}")
    doubles = (f"{name} ({', '.join(where)})" for name, where in sorted(double_names().items()))
    lines.append(f"names used twice: {'; '.join(doubles) or 'none'}")
    long = (f"{name} ({size})" for name, size in long_functions(LONG).items())
    lines.append(f"functions over {LONG} lines: {', '.join(long) or 'none'}")
    return "\n".join(lines)


def test_cases() -> str:
    """How many cases the README's test command runs, and how many there are in all, slow ones and those for a GPU included."""
    counts = []
    for marks in ("not slow and not gpu", ""):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-n", "0", "-p", "no:cacheprovider", "-m", marks]
        ended = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
        counts.append(sum("::" in line for line in ended.stdout.splitlines()))
    return f"test cases: {counts[0]} in the README's command, {counts[1]} in all"


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
    sys.stdout.write(f"{test_cases()}\n")
