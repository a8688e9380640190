"""Checkpoints: a folder that appears by one rename, complete and verified, or not at all. Nothing is pickled."""

import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from dmpctl.errors import IntegrityError
from dmpctl.files import (
    fsync,
    json_to_bytes,
    make_folder,
    read_json,
    read_tensors,
    sha256_of,
    sha256_of_bytes,
    tensors_to_bytes,
    write_atomic,
    write_json,
    write_tensors,
    writing,
)
from dmpctl.processes.sharded import shared_like, whole
from dmpctl.runs.records import Description

SCHEMA_VERSION = 1
NAME = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True)
class TrainerState:
    """All that training needs to go on: `raw` and `ema` weights by name, AdamW moments by name, the scaler's state.

    `ema` is empty where no average is kept; `scaler` is empty without fp16.
    """

    step: int
    raw: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    scaler: dict[str, JsonValue]


def capture(
    step: int, module: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor], scaler: dict[str, JsonValue]
) -> TrainerState:
    """The state of training after `step` steps; a collective where the module is shared out."""
    parameters = dict(module.named_parameters())
    moments = {
        n: {k: whole(torch.as_tensor(v)) for k, v in optimizer.state[p].items()}
        for n, p in parameters.items()
        if p in optimizer.state
    }
    raw, averages = ({n: whole(v) for n, v in tensors.items()} for tensors in (parameters, ema))
    return TrainerState(step, raw, averages, moments, scaler)


@torch.no_grad()
def restore(state: TrainerState, module: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor]) -> None:
    """Put a state back in place; IntegrityError where names or shapes are not exactly the module's."""
    parameters = dict(module.named_parameters())
    for found, wanted in ((state.raw, parameters), (state.ema, ema)):
        refuse_other_keys(found, wanted, "this checkpoint")
        for name, tensor in wanted.items():
            tensor.copy_(shared_like(found[name], tensor))
    for name, moments in state.optimizer.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {k: v if k == "step" else shared_like(v, parameter) for k, v in moments.items()}


def refuse_other_keys(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """IntegrityError unless both hold the same names with the same shapes."""
    if missing := sorted(set(wanted) - set(found)):
        raise IntegrityError(f"{what} lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}")
    if extra := sorted(set(found) - set(wanted)):
        raise IntegrityError(f"{what} has unexpected {', '.join(extra[:3])}{' and more' if len(extra) > 3 else ''}")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise IntegrityError(f"{what}: {name} has shape {list(found[name].shape)}, expected {list(tensor.shape)}")


def save(
    folder: Path,
    kind: str,
    weights: Mapping[str, Tensor],
    described: Description,
    state: TrainerState,
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """Write `step-NNNNNNN/` with {kind}.safetensors, {kind}.json and the trainer's files.

    The last `keep` stay, and those of every multiple of `keep_every` (None: no others). trainer.json is written last and
    holds the sha256 of all others. UsageError where the disk is full.
    """
    final = folder / name_of(state.step)
    for leftover in folder.glob("step-*.tmp"):  # of a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = make_folder(folder / f"{final.name}.tmp")
    try:
        hashes = {f"{kind}.safetensors": write_tensors(temporary / f"{kind}.safetensors", weights)}
        which = "ema" if state.ema else "raw"
        record = {**described.to_json(), "step": state.step, "weights": which, "sha256": hashes[f"{kind}.safetensors"]}
        write_json(temporary / f"{kind}.json", record)
        hashes[f"{kind}.json"] = sha256_of(temporary / f"{kind}.json")
        tensors = {f"raw.{n}": v for n, v in state.raw.items()} | {f"ema.{n}": v for n, v in state.ema.items()}
        tensors |= {f"optimizer.{k}.{n}": v for n, moments in state.optimizer.items() for k, v in moments.items()}
        hashes["trainer.safetensors"] = write_tensors(temporary / "trainer.safetensors", tensors)
        manifest = {"schema_version": SCHEMA_VERSION, "step": state.step, "scaler": state.scaler, "sha256": hashes}
        write_json(temporary / "trainer.json", manifest)
        with writing(final):
            fsync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in complete(folder)[:-keep]:
        if keep_every is None or step_of(old) % keep_every:
            shutil.rmtree(old.rename(old.with_name(f"{old.name}.tmp")))  # renamed: it is none from the first moment on
    return final


def newest(folder: Path) -> tuple[TrainerState | None, list[str]]:
    """The newest checkpoint that is whole, None if there is none yet; and what is wrong with newer ones, which are put aside.

    IntegrityError where none of several is whole.
    """
    wrong: list[str] = []
    for path in reversed(complete(folder)):
        try:
            return load(path), wrong
        except IntegrityError as error:
            wrong.append(error.message)
    if wrong:
        raise IntegrityError(f"no checkpoint in {folder} is whole: {wrong[0]}", f"delete {folder} to begin anew")
    return None, wrong


def put_aside(folder: Path, step: int) -> None:
    """Rename checkpoints after `step`, which are damaged: they count no more, and can be looked at."""
    for path in complete(folder):
        if step_of(path) > step:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def name_of(step: int) -> str:
    """The folder of the checkpoint of a step."""
    return f"step-{step:07d}"


def step_of(path: Path) -> int:
    """The step of a finished checkpoint, by its folder's name."""
    return int(path.name.removeprefix("step-"))


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; leftovers of an interrupted save are no checkpoints."""
    return sorted((p.parent for p in folder.glob("step-*/trainer.json") if NAME.fullmatch(p.parent.name)), key=step_of)


def load(path: Path) -> TrainerState:
    """Read and verify one checkpoint; IntegrityError naming the file whose bytes are not those that were written."""
    manifest, hint = read_json(path / "trainer.json", SCHEMA_VERSION), f"delete {path} to go on from the one before"
    for name, expected in manifest["sha256"].items():
        actual = sha256_of(path / name) if (path / name).is_file() else "no file"
        if actual != expected:
            raise IntegrityError(f"{path / name} is damaged: sha256 {actual}, expected {expected}", hint)
    tensors, _ = read_tensors(path / "trainer.safetensors")
    raw = {n.removeprefix("raw."): v for n, v in tensors.items() if n.startswith("raw.")}
    ema = {n.removeprefix("ema."): v for n, v in tensors.items() if n.startswith("ema.")}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, key, parameter = name.split(".", 2)
            moments.setdefault(parameter, {})[key] = value
    return TrainerState(int(manifest["step"]), raw, ema, moments, manifest["scaler"])


def publish(checkpoint: Path, kind: str, run: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Put the weights of a finished checkpoint into the run's root, each file by one rename, its JSON last.

    A file that is there already is left alone, so this may be done again: training may have been killed just before it.
    `metadata` goes into the safetensors file, so that it describes itself; None: nothing.
    """
    tensors, _ = read_tensors(checkpoint / f"{kind}.safetensors")
    data = tensors_to_bytes(tensors, metadata)
    about = {**read_json(checkpoint / f"{kind}.json"), "sha256": sha256_of_bytes(data)}
    for path, content in ((run / f"{kind}.safetensors", data), (run / f"{kind}.json", json_to_bytes(about))):
        if not path.is_file() or path.read_bytes() != content:
            write_atomic(path, content)


class Saver:
    """Context that writes the checkpoints of one run into `folder`, one at a time, in order, while training goes on.

    `keep`, `keep_every`: which stay, as in `save`. What goes wrong is raised by the next call.
    """

    def __init__(self, folder: Path, kind: str, keep: int, keep_every: int | None = None) -> None:
        self._folder, self._kind, self._keep, self._keep_every = folder, kind, keep, keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._going: Future[Path] | None = None

    def save(self, state: TrainerState, untrained: Mapping[str, Tensor], described: Description) -> None:
        """Write this checkpoint, after the one before; returns when all of it has been copied.

        What is used afterwards: the average where one is kept, else the raw weights, and `untrained` tensors of the module.
        """
        self.finish()
        moments = {name: _copied(values) for name, values in state.optimizer.items()}
        kept = TrainerState(state.step, _copied(state.raw), _copied(state.ema), moments, state.scaler)
        weights = _copied(untrained) | kept.raw | kept.ema
        self._going = self._pool.submit(save, self._folder, self._kind, weights, described, kept, self._keep, self._keep_every)

    def check(self) -> None:
        """Raise what went wrong, if it is known already."""
        if self._going is not None and self._going.done():
            self.finish()

    def finish(self) -> None:
        """Wait until everything is on disk; raises what went wrong."""
        going, self._going = self._going, None
        if going is not None:
            going.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()
        if kind is None:
            self.finish()


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, in memory of their own."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
