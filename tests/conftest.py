"""What tests of several rooms share: a finished run, and the command line in this process."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from dmpctl.cli.app import main
from dmpctl.comparing import paired_loss
from tests.helpers import Done, made_once, patch_run, pretrain_run
from tests.random_inception import write_random_inception

torch.set_num_threads(1)
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # ignored where the tests run in the background: so would commands
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DMPCTL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def fresh_precision() -> Iterator[None]:
    """accelerate keeps one precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `dmpctl patch` that has ended: 6 steps, checkpoints at 3 and 6. Not to be written to: take a copy."""
    return made_once(tmp_path_factory, "finished", lambda run: patch_run(run, prompt_lr=0.05, gate_lr=0.05, ema=0.0))


@pytest.fixture(scope="session")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished class-conditional backbone on the digits. Not to be written to."""
    return made_once(tmp_path_factory, "conditional", lambda run: pretrain_run(run, class_conditional=True, lr=3e-3))


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in torch-fidelity's file format. Not to be written to."""
    return made_once(tmp_path_factory, "random-inception.pth", write_random_inception)


@pytest.fixture
def arrow_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps files that `datasets` prepares out of the home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("arrow")))


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with how many bytes every disk is to have free."""
    return lambda count: monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=count))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with the command line that this process is to have been started with."""
    return lambda *words: monkeypatch.setattr(sys, "argv", list(words))


@pytest.fixture
def most_loss_images(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Compare losses on at most so many images: they are most of what a small comparison takes."""
    return lambda count: monkeypatch.setattr(paired_loss, "MOST_IMAGES", count)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`dmpctl args` in this process: much faster than one of its own."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "")  # so that what --offline sets is taken back, too
    for name in ("DMPCTL_CACHE_DIR", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so is what --cache-dir sets
        if not os.environ[name]:
            monkeypatch.delenv(name)

    def run(*args: object) -> Done:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return Done(code, *capsys.readouterr())

    return run
