"""Faults by the hundred: kill -9, SIGTERM, files that end early, flipped bits and disks that are full, in every phase.

`python -m tests.faults --tries 200 --seed 0` prints what came of them; every moment, byte and bit is drawn from the seed. After
each fault, all that is there must be whole; after a few, the same command must end with the bytes of an undisturbed run.
"""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dmpctl.errors import IntegrityError
from dmpctl.files import read_tensors, sha256_of
from dmpctl.runs import checkpoint
from dmpctl.sampling.pictures import read_png
from tests.helpers import colour_folder, environment, flip, patch_run
from tests.latent_helpers import TINY_SIDE, tiny_vae

PER_CHAIN = 5  # faults before a command is left to end
PATCH = ("patch", "--cpu", "--iters", 200, "--batch-size", 8, "--save-every", 2, "--log-every", 1, "--no-evaluate")
ENDS = {signal.SIGKILL: {-9}, signal.SIGTERM: {143}}


@dataclass(frozen=True)
class Phase:
    """A command that is disturbed. `line(place)` in a folder of its own; `whole(place)` raises where half of something is there
    under its name; `result(place)` is what must come out, whatever happened."""

    name: str
    line: Callable[[Path], tuple[object, ...]]
    whole: Callable[[Path], None]
    result: Callable[[Path], dict[str, str]]


@dataclass
class Row:
    """What came of one kind of fault in one phase."""

    phase: str
    fault: str
    tries: int = 0
    hit: int = 0  # the command was at work when it came
    survived: int = 0
    ends: int = 0
    equal: int = 0
    notes: list[str] = field(default_factory=list)


def checkpoints_whole(place: Path) -> None:
    for path in checkpoint.complete(place / "run" / "checkpoints"):
        checkpoint.load(path)
    for path in (place / "run").glob("patch.safetensors"):
        read_tensors(path)


def pictures_whole(place: Path) -> None:
    for path in (place / "images").glob("[0-9]*.png"):
        read_png(path)


def latents_whole(place: Path) -> None:
    for path in (place / "cache" / "latents").glob("*/*.safetensors"):
        read_tensors(path)


def digests(folder: Path, pattern: str) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob(pattern)) if path.is_file()}


def phases(shared: Path) -> list[Phase]:
    """The phases, with what they need made once in `shared`."""
    patch_run(shared / "trained", prompt_lr=0.05, gate_lr=0.05, ema=0.0)
    colour_folder(shared / "photos", 400, TINY_SIDE)
    tiny_vae(shared / "vae")
    sampled = ("--cpu", "--sampler", "ddim", "--steps", 10, "--sample-batch", 16)
    return [
        Phase(
            "training and checkpoints",
            lambda place: (*PATCH, "--run", place / "run"),
            checkpoints_whole,
            lambda place: digests(place / "run", "patch.safetensors"),
        ),
        Phase(
            "caching latents",
            lambda place: (
                *("download", shared / "photos", "--latents", shared / "vae", "--size", TINY_SIDE),
                *("--cache-dir", place / "cache", "--codec-batch", 4, "--cpu"),
            ),
            latents_whole,
            lambda place: digests(place / "cache" / "latents", "shard-*"),
        ),
        Phase(
            "sampling",
            lambda place: ("sample", shared / "trained", "--num-images", 1500, "--out", place / "images", *sampled),
            pictures_whole,
            lambda place: digests(place / "images", "[0-9]*.png"),
        ),
        Phase(
            "fid",
            lambda place: (
                *(
                    "fid",
                    linked(shared / "trained", place / "run"),
                    "--max-images",
                    1500,
                    "--cache-dir",
                    place / "cache",
                    *sampled,
                ),
            ),
            lambda place: None,
            lambda place: {path.stem.rsplit("-", 1)[0]: value_of(path) for path in (place / "run" / "metrics").glob("*.json")},
        ),
    ]


def linked(trained: Path, place: Path) -> Path:
    """A copy of a run, made once."""
    if not place.exists():
        shutil.copytree(trained, place)
    return place


def value_of(path: Path) -> str:
    found = json.loads(path.read_text("utf-8"))
    return f"{found['value']:.6f} of {found['n']}"


def started(phase: Phase, place: Path, largest: int | None = None) -> subprocess.Popen[bytes]:
    """The phase's command in the background; `largest`: no file can grow over so many bytes, as on a full disk."""
    place.mkdir(parents=True, exist_ok=True)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest or 0, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "dmpctl", *map(str, phase.line(place)), "--offline", "--quiet"]
    return subprocess.Popen(
        command,
        env=environment(),
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=None if largest is None else limited,
    )


def ended(process: subprocess.Popen[bytes], seconds: float = 300) -> tuple[int, str]:
    _, err = process.communicate(timeout=seconds)
    return process.returncode, err.decode(errors="replace")


def undisturbed(phase: Phase, place: Path) -> tuple[dict[str, str], float]:
    """What comes out without a fault, and the seconds that it takes."""
    began = time.monotonic()
    code, err = ended(started(phase, place))
    if code or not phase.result(place):
        raise RuntimeError(f"{phase.name} does not work at all: {err}")
    return phase.result(place), time.monotonic() - began


def signalled(phase: Phase, number: signal.Signals, tries: int, draw: random.Random, folder: Path) -> Row:
    """Signals at random moments of the whole command, start-up included, in chains that end with an undisturbed one."""
    expected, seconds = undisturbed(phase, folder / "straight")
    row = Row(phase.name, number.name)
    while row.tries < tries:
        place = folder / f"chain-{row.ends}"
        for _ in range(min(PER_CHAIN, tries - row.tries)):
            row.tries += 1
            process = started(phase, place)
            time.sleep(draw.uniform(0.3, 1.0) * seconds)
            at_work = process.poll() is None
            process.send_signal(number)
            code, err = ended(process)
            row.hit += at_work
            whole = _said(row, partial(phase.whole, place))
            known = code in {0, *ENDS[number]} or (code == -number and number == signal.SIGTERM)  # before it could listen
            row.survived += whole and known
            if not known:
                row.notes.append(f"exit code {code}: {err[-200:]}")
        _finish(row, phase, place, expected)
    return row


def _said(row: Row, check: Callable[[], object]) -> bool:
    try:
        check()
    except (IntegrityError, OSError, ValueError) as error:
        row.notes.append(str(error)[:200])
        return False
    return True


def _finish(row: Row, phase: Phase, place: Path, expected: dict[str, str]) -> None:
    """Let the command end, and compare with what it gives undisturbed."""
    code, err = ended(started(phase, place))
    row.ends += 1
    row.equal += code == 0 and phase.result(place) == expected
    if code:
        row.notes.append(f"did not end: {code}: {err[-200:]}")
    shutil.rmtree(place)


def full_disk(phase: Phase, tries: int, draw: random.Random, folder: Path) -> Row:
    """No file can grow over a random number of bytes: one sentence, exit code 2, and the command goes on when there is room."""
    expected, _ = undisturbed(phase, folder / "straight")
    largest = max(path.stat().st_size for path in (folder / "straight").rglob("*") if path.is_file())
    row = Row(phase.name, "full disk")
    for number in range(tries):
        place = folder / f"full-{number}"
        row.tries += 1
        code, err = ended(started(phase, place, draw.randrange(1, largest)))
        row.hit += code != 0
        whole = _said(row, partial(phase.whole, place))
        row.survived += whole and (code == 0 or (code == 2 and err.count("error: ") == 1 and "Traceback" not in err))
        if code not in (0, 2):
            row.notes.append(f"exit code {code}: {err[-200:]}")
        _finish(row, phase, place, expected)
    return row


def damaged(tries: int, draw: random.Random, folder: Path) -> Iterator[Row]:
    """Torn and bit-flipped files of the newest checkpoint: the one before is taken, and the end is the same."""
    given = {"iters": 8, "save_every": 2, "keep_last": 4, "batch_size": 8}
    patch_run(folder / "straight", **given)
    patch_run(folder / "half", **given | {"iters": 6})
    newest = checkpoint.complete(folder / "half" / "checkpoints")[-1]
    for fault in ("torn file", "flipped bit"):
        row = Row("resuming", fault)
        for number in range(tries):
            run = folder / f"{fault[:4]}-{number}"
            shutil.copytree(folder / "half", run)
            path = draw.choice(sorted((run / "checkpoints" / newest.name).iterdir()))
            size = path.stat().st_size
            if fault == "torn file":
                path.write_bytes(path.read_bytes()[: draw.randrange(size)])
            else:
                flip(path, draw.randrange(size))
            row.tries += 1
            row.hit += 1
            row.survived += _said(row, partial(patch_run, run, **given))
            row.ends += 1
            row.equal += digests(run, "patch.safetensors").get("patch.safetensors") == sha256_of(
                folder / "straight" / "patch.safetensors"
            )
            shutil.rmtree(run)
        yield row


def campaign(tries: int, seed: int, folder: Path, report: Callable[[Row], None], only: str | None = None) -> list[Row]:
    """`tries` kills over all phases, and in proportion the other faults. Each row is reported as it is finished.

    `only`: the phase to disturb, None: all of them.
    """
    draw, rows = random.Random(seed), []
    every = phases(folder / "shared")
    shares = (0.55, 0.15, 0.15, 0.15)
    work: list[Callable[[Path], Row]] = []
    for phase, share in zip(every, shares, strict=True):
        if only not in (None, phase.name):
            continue
        kills, terms, disks = max(1, round(share * tries)), max(1, round(share * tries / 5)), max(1, round(share * tries / 8))
        work.append(partial(signalled, phase, signal.SIGKILL, kills, draw))
        work.append(partial(signalled, phase, signal.SIGTERM, terms, draw))
        work.append(partial(full_disk, phase, disks, draw))
    for number, act in enumerate(work):
        rows.append(act(folder / f"work-{number}"))
        report(rows[-1])
        shutil.rmtree(folder / f"work-{number}", ignore_errors=True)
    for row in damaged(max(1, tries // 4), draw, folder / "damaged") if only is None else ():
        rows.append(row)
        report(row)
    return rows


def table(rows: list[Row]) -> str:
    """As Markdown."""
    head = "| phase | fault | tries | at work when it came | whole and as documented | ended after it | equal to undisturbed |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    lines += [f"| {r.phase} | {r.fault} | {r.tries} | {r.hit} | {r.survived} | {r.ends} | {r.equal} |" for r in rows]
    total = [sum(getattr(r, name) for r in rows) for name in ("tries", "hit", "survived", "ends", "equal")]
    return "\n".join([*lines, f"| **all** | | {' | '.join(map(str, total))} |"])
