"""README's commands are real: each parses, with every option it names, and its test command is what CI runs."""

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmpctl.studies.study import read_study
from tests.helpers import Done, environment

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [README, *(page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [part.strip() for block in BLOCKS for line in block.splitlines() for part in line.split("&&")]
OURS = [command for command in COMMANDS if command.startswith("dmpctl ")]


def test_readme_opens_with_the_two_commands() -> None:
    first, second = BLOCKS[0].strip(), BLOCKS[1].strip()
    assert first == "python -m pip install . && dmpctl patch"
    assert second == "python -m pip install '.[test]' && python -m pytest"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    lines = [
        line.replace("--quiet --disable-pip-version-check ", "") for line in script.splitlines() if not line.startswith("stage")
    ]
    assert all(part.strip() in lines for part in BLOCKS[1].strip().split("&&"))


@pytest.mark.parametrize("command", OURS)
def test_each_command_of_the_readme_parses(command: str, cli: Callable[..., Done]) -> None:
    done = cli(*shlex.split(command)[1:], "--print-config")
    assert done.code == 0, done.err
    assert "origin" in done.out


ELSEWHERE = ("hf://", "photos", "latent", "sd15", "download", "compare ")  # what needs other people's data, or hours


def test_the_commands_of_the_readme_run_in_their_order(cli: Callable[..., Done], tmp_path: Path, monkeypatch: Any) -> None:
    """All that need nothing but the package, made small by variables; the one that asks for a threshold may miss it."""
    small = {"ITERS": 12, "BATCH_SIZE": 16, "EVAL_IMAGES": 70, "MAX_IMAGES": 70, "NUM_IMAGES": 4, "SAMPLER": "ddim", "STEPS": 2}
    for name, value in {**small, "CPU": 1, "TIMESTEPS": 5}.items():
        monkeypatch.setenv(f"DMPCTL_{name}", str(value))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    ran = [command for command in OURS if not any(word in command for word in ELSEWHERE)]
    assert len(ran) >= 12
    for command in ran:
        done = cli(*shlex.split(command)[1:])
        assert done.code in ((0, 6) if "--fail-above" in command else (0,)), (command, done.err)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_each_python_block_of_the_readme_runs(block: str, tmp_path: Path) -> None:
    env = environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2


@pytest.mark.parametrize(
    "module", sorted({name for page in PAGES for name in re.findall(r"python -m ((?:tests|benchmarks)[.\w]*\w)", page)})
)
def test_each_module_of_the_tests_that_a_page_runs_is_there(module: str) -> None:
    """They are run by hand: a name that has moved would not be missed until someone wants their numbers."""
    package = importlib.import_module(module)
    if hasattr(package, "__path__"):
        importlib.import_module(f"{module}.__main__")


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_each_example_resolves_for_the_commands_it_opens_with(file: Path, cli: Callable[..., Done]) -> None:
    commands = re.findall(r"^#[ \t]+(dmpctl .*?)[ \t]*(?:#.*)?$", file.read_text("utf-8"), re.M)
    named = [words for words in (shlex.split(line)[1:] for line in commands) if words[-1] == f"examples/{file.name}"]
    assert named
    for words in named:
        if words[0] == "compare":
            assert read_study(file).variants
            continue
        done = cli(*words[:-1], file, "--print-config")
        assert done.code == 0, done.err
        assert f"{file}" in done.out
