import os
import sys
from types import ModuleType

import pytest

from dmpctl.cli.app import main

OUTSIDE = (
    *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "DMPCTL_CACHE_DIR"),
    *("CI", "RANK", "NO_COLOR", "FORCE_COLOR", "COLUMNS"),
)


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DMPCTL_")] + list(OUTSIDE):
        monkeypatch.setenv(name, "")  # so that what a command sets is taken back, too
        monkeypatch.delenv(name)


@pytest.fixture
def dmpctl_(capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def engine(monkeypatch):
    """Put a function in the place of what a command calls: `engine("training.patch", "patch", body)`."""

    def put(module: str, function: str, body) -> None:
        fake = ModuleType(f"dmpctl.{module}")
        setattr(fake, function, body)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)

    return put
