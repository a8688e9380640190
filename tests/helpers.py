"""Small runs and command lines for tests of the engine: seconds, not minutes."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

import dmpctl
from dmpctl.backbones.dit import DiT
from dmpctl.data.bundled import Digits
from dmpctl.files import read_tensors, sha256_of
from dmpctl.models.backbone import load_backbone
from dmpctl.models.build import build_patch
from dmpctl.processes.accelerator import accelerator_for
from dmpctl.processes.command import Command
from dmpctl.processes.ranks import Ranks
from dmpctl.runs.records import Description
from dmpctl.runs.rundir import RunDir
from dmpctl.sampling.pictures import write_pngs
from dmpctl.settings.layers import resolve
from dmpctl.settings.methods import Dmp
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Base
from dmpctl.training.patch import patch
from dmpctl.training.pretrain import pretrain
from dmpctl.training.session import Session, inputs_of
from dmpctl.training.trainer import Trainer
from dmpctl.types import Report, Silent

SOURCE = Path(dmpctl.__file__).parents[1]
SMALL = {"iters": 6, "batch_size": 8, "log_every": 1, "save_every": 3, "keep_last": 5, "cpu": True}
SHAPE = {"hidden_size": 16, "depth": 2, "num_heads": 2}
QUICK = [*(f"--{key.replace('_', '-')}={value}" for key, value in (SMALL | SHAPE).items() if key != "cpu"), "--cpu"]
BUNDLED = load_backbone(Base()).model.config  # whatever shape it has: no test knows its numbers
BUNDLED_SPEC = DiT(BUNDLED).spec
BUNDLED_PATCH = build_patch(DiT(BUNDLED), Dmp()).added
TIMING = ("steps_per_sec", "images_per_sec", "data_wait", "peak_memory_mib", "crc")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def settings_for(command: str, **given: Any) -> Settings:
    """The settings of `dmpctl command` with these fields given, as the command line would resolve them."""
    return resolve(command, given).settings


def patch_run(run: Path, **given: Any) -> Report:
    """A small `dmpctl patch` without its comparison."""
    return patch(settings_for("patch", **{"run": run, "evaluate": False, **SMALL, **given}), Silent())


def pretrain_run(run: Path, **given: Any) -> Report:
    """A small `dmpctl pretrain` on the digits."""
    return pretrain(settings_for("pretrain", **{"run": run, "data": "digits", **SHAPE, **SMALL, **given}), Silent())


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The path that `make` fills: by the first worker of a session that needs it, for all of them."""
    own = factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    path, done = root / "shared" / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            path.parent.mkdir(exist_ok=True)
            make(path)
            done.touch()
    return path


def trainer_of(session: Session[Description], settings: Settings, run: RunDir, kind: type[Trainer] = Trainer) -> Trainer:
    """A session's trainer, as `train_in` makes it."""
    accelerator = accelerator_for(settings)
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    command = Command(settings, Silent(), ranks)
    return kind(session.subject, inputs_of(session, run, command), run, command, accelerator)


def run_cli(*args: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 500) -> Done:
    """`dmpctl args` in a process of its own, from the source that is tested."""
    command = [sys.executable, "-m", "dmpctl", *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment() | (env or {}), capture_output=True, text=True, timeout=timeout)
    return Done(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """The environment of a command: this one, without settings, with the source that is tested first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DMPCTL_")}
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "CI": "true"}


def tree(root: Path) -> dict[str, str]:
    """Every file under a folder with its sha256; a folder has "folder"."""
    return {
        str(path.relative_to(root)): "folder" if path.is_dir() else sha256_of(path)
        for path in root.rglob("*")
        if path.is_file() or path.is_dir()
    }


def files(root: Path) -> set[str]:
    """Every file under a folder."""
    return {name for name, digest in tree(root).items() if digest != "folder"}


def copied(run: Path, to: Path) -> Path:
    """A copy of a run, to be damaged."""
    return Path(shutil.copytree(run, to))


def same_but_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def flip(path: Path, position: int = -1) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def write_by_hand(path: Path, about: dict[str, Any]) -> None:
    """A record that somebody changed and meant to: without its seal."""
    path.write_text(json.dumps({key: value for key, value in about.items() if key != "sealed"}), "utf-8")


def tensors_of(path: Path) -> dict[str, Any]:
    return read_tensors(path)[0]


def digit_folder(root: Path, count: int = 1797) -> Path:
    """The first digits as grey 8x8 PNGs."""
    root.mkdir(parents=True, exist_ok=True)
    images = Digits().images()[:count]
    write_pngs(root, range(count), images)
    return root


def colour_folder(root: Path, count: int = 60, size: int = 16) -> Path:
    """Digits enlarged to `size`, in a colour of their own, one sub-folder per class."""
    source = Digits()
    for index in range(count):
        image, label = source.item(index)
        tint = np.random.default_rng(index).uniform(0.3, 1, 3)
        grey = Image.fromarray(image[0].numpy()).resize((size, size), Image.Resampling.BICUBIC)
        colour = (np.asarray(grey)[..., None] * tint).round().astype(np.uint8)
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colour).save(folder / f"{index}.png")
    return root


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow past `size` bytes: as on a full disk, a write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Hostile:
    """Unpickled without care, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))
