"""Every file that a run, a study or the cache leaves behind, damaged, then read: one bit, cut off, a page of zeros.

`python -m tests.faults.fuzz --seed 0 --tries 300` prints what came of it; file, place and command are drawn from the seed.
A command may refuse (exit code not 0, one sentence), give what it gives undamaged, or say what it makes again or leaves out. It
may not give other numbers in silence, end as "a bug", hang, or take a GiB more than it takes undamaged.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dmpctl.cli.app import main
from dmpctl.comparing import paired_loss
from dmpctl.sampling.pictures import read_png
from tests.helpers import colour_folder, pretrain_run
from tests.latent_helpers import TINY_SIDE, tiny_vae

FEW = ("--cpu", "--sampler", "ddim", "--steps", "2")
TRAIN = (
    *["--iters", "3", "--batch-size", "8", "--save-every", "3", "--keep-last", "5", "--log-every", "1", "--eval-images", "70"],
    *FEW,
)
TIMES = ("measured", "eval_seconds", "train_seconds", "seconds", "made", "kept", "bytes", "device")  # not the same twice
SAID = ("again", "anew", "left out", "damaged", "older dmpctl")  # words of a warning
SECONDS, GIB = 120, 2**30
STUDY = """
[compare]
run = "study"
seeds = [1]
eval_images = 70
[stages]
flat = "backbone"
[settings]
data = "digits"
iters = 2
batch_size = 8
sampler = "ddim"
steps = 2
[variants.dmp]
method = "dmp"
"""
RESUME, SAMPLE, FID = "patch --run run {train}", "sample run {few}", "fid run {few} --max-images 70"
IMAGES, GATES = "sample run {few} --num-images 70", "inspect-gates run"
EXPORT, PUSH = "export run --to merged --out out.safetensors", "push run hf://a/b --dry-run"
# What reads the files of a folder, by the pattern of their names; the first that fits counts. {f}: the file itself.
READERS = {
    "run/config.json": (SAMPLE, RESUME, "report run", FID),
    "run/patch.json": (
        SAMPLE,
        EXPORT,
        PUSH,
        GATES,
    ),
    "run/patch.safetensors": (
        SAMPLE,
        "export run --to patch --out out",
        GATES,
        RESUME,
    ),
    "run/provenance.json": ("report run", RESUME),
    "run/metrics.jsonl": ("report run", RESUME),
    "run/checkpoints/**/*": (RESUME, "sample run --weights raw {few}"),
    "run/metrics/features/**/*": (FID,),
    "run/metrics/*.json": ("report run", "fid run --show", PUSH, RESUME),
    "run/samples/*/samples.json": (IMAGES, "fid {d} --reference digits --cpu"),
    "run/samples/*/0*.png": (IMAGES, "fid {d} --reference digits --cpu"),
    "run/*.png": ("report run",),
    "run/samples/*/*.png": ("report run",),
    "cache/statistics/*": (FID,),
    "cache/latents/**/*": ("download photos --latents vae --size {side} --cpu --codec-batch 8",),
    "backbone/backbone.*": ("sample backbone {few} --num-images 4", "compare study.toml --cpu"),
    "study/**/cell.json": ("compare study.toml --cpu",),
    "study/**/stage.*": ("compare study.toml --cpu",),
    "study/**/*": ("compare study.toml --cpu",),
    "images.npz": ("fid images.npz --reference stats.safetensors --cpu --extractor pixels",),
    "stats.safetensors": ("fid images.npz --reference stats.safetensors --cpu --extractor pixels",),
    "merged.safetensors": ("sample merged.safetensors {few} --num-images 4 --out some",),
}
SKIPPED = (".lock", "contact-sheet.png.", "report.html", "key.json")


@dataclass(frozen=True)
class Outcome:
    """Result of one command: exit code, a digest of its results, and whether it said something of damage."""

    code: int
    result: str
    said: bool
    err: str


def plain(value: object) -> object:
    """JSON without what differs from one time to the next."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in TIMES}
    return [plain(item) for item in value] if isinstance(value, list) else value


def run_line(line: str, place: Path) -> Outcome:
    """`dmpctl line` in this process, in the folder `place`."""
    out, err = io.StringIO(), io.StringIO()
    words = line.format(few=" ".join(FEW), train=" ".join(TRAIN), side=TINY_SIDE).split()
    with contextlib.chdir(place), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*words, "--offline", *(() if "report" in words else ("--json",))])
        digest = hashlib.sha256()
        if "report" in words and code == 0:
            digest.update(Path("run/report.html").read_bytes())
        elif code in (0, 6):
            digest.update(json.dumps(plain(json.loads(out.getvalue())), sort_keys=True).encode())
            if words[0] == "sample":
                for path in sorted(Path(json.loads(out.getvalue())["out"]).glob("0*.png")):
                    digest.update(read_png(path).numpy().tobytes())
            for path in map(Path, ("out.safetensors", "out/patch.safetensors", "run/patch.safetensors")):
                digest.update(path.read_bytes() if path.is_file() else b"")
    text = out.getvalue() + err.getvalue()
    return Outcome(code, digest.hexdigest(), any(re.search(rf"\b{word}\b", text) for word in SAID), err.getvalue()[-300:])


def prepared(place: Path) -> None:
    """A run with all that commands leave in it, a backbone, a study, cached statistics and latents, images and statistics."""
    colour_folder(place / "photos", 24, TINY_SIDE)
    tiny_vae(place / "vae")
    pretrain_run(place / "backbone", iters=3)
    (place / "study.toml").write_text(STUDY)
    lines = [
        "patch --run run {train}",
        "sample run {few} --num-images 70",
        "fid run {few} --max-images 70",
        "sample run {few} --num-images 90 --sample-seed 5 --format npz --out npz",
        "fid run {few} --max-images 70 --save-stats stats.safetensors",
        "export run --to merged --out merged.safetensors",
        "download photos --latents vae --size {side} --cpu --codec-batch 8",
        "compare study.toml --cpu",
    ]
    for line in lines:
        done = run_line(line, place)
        if done.code:
            raise RuntimeError(f"{line}: {done.err}")
    (place / "npz" / "90.npz").rename(place / "images.npz")
    shutil.rmtree(place / "npz")


def damage(path: Path, kind: str, draw: random.Random) -> None:
    """One bit, the end cut off, or a page (4096 bytes, or an eighth of a small file) of zeros."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    if kind == "one bit":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "cut off":
        del data[at:]
    else:
        size = min(4096, max(8, len(data) // 8))
        start = at // size * size
        data[start : start + size] = bytes(len(data[start : start + size]))
    status = path.stat()
    path.write_bytes(bytes(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # a disk that fails leaves the time alone


def candidates(place: Path) -> dict[str, list[Path]]:
    """The files of each pattern, each once."""
    found: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    for pattern in READERS:
        paths = [path for path in sorted(place.glob(pattern)) if path.is_file() and path.stat().st_size and path not in seen]
        found[pattern] = [path for path in paths if not any(word in path.name for word in SKIPPED)]
        seen |= set(paths)
    return {pattern: paths for pattern, paths in found.items() if paths}


@contextlib.contextmanager
def bounded(limit: int) -> Iterator[None]:
    """A command may take `limit` bytes of address space, and SECONDS."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before, soft = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, soft[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, soft)


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def judged(found: Outcome, whole: Outcome) -> str:
    """Names the outcome: refused, equal, made again (said), or one of the faults, in capitals."""
    if "this is a bug" in found.err or "internal" in found.err:
        return "MEMORY" if "MemoryError" in found.err else "HANG" if "TimeoutError" in found.err else "BUG"
    if found.code not in (0, 6):
        return "refused"
    said = found.said and not whole.said
    if found.result == whole.result:
        return "made again, said, equal" if said else "equal"
    return "left out, said" if said else "WRONG"


def fuzz(tries: int, seed: int, folder: Path, only: str = "") -> tuple[Counter[tuple[str, str, str]], list[str]]:
    """How often each (pattern, kind, outcome) came, and a sentence for each fault."""
    draw, counts, faults = random.Random(seed), Counter[tuple[str, str, str]](), list[str]()
    place, pristine = folder / "place", folder / "pristine"
    os.environ["DMPCTL_CACHE_DIR"] = str(place / "cache")
    place.mkdir()
    prepared(place)
    shutil.copytree(place, pristine)
    known = {pattern: paths for pattern, paths in candidates(place).items() if only in pattern}
    whole: dict[str, Outcome] = {}
    for _ in range(tries):
        pattern = draw.choice(list(known))
        path, kind = draw.choice(known[pattern]), draw.choice(("one bit", "cut off", "page of zeros"))
        line = draw.choice(READERS[pattern]).replace("{d}", str(path.parent)).replace("{f}", str(path))
        again = "features" in pattern or "statistics" in pattern or line.startswith("download")
        for number in range(2) if line not in whole else (1,):  # first as it is, for comparison
            shutil.rmtree(place)
            shutil.copytree(pristine, place, copy_function=shutil.copy2)
            if not again and "fid run" in line and "--show" not in line:
                shutil.rmtree(place / "run" / "metrics" / "features")
            if number == 0:
                whole[line] = run_line(line, place)
                continue
            damage(path, kind, draw)
            with bounded(address_space() + GIB):
                found = run_line(line, place)
            what = judged(found, whole[line])
            counts[pattern, kind, what] += 1
            if what.isupper():
                faults.append(f"{what}: {path.relative_to(place)} {kind}: {line}: {found.code} {found.err.strip()}")
                sys.stderr.write(faults[-1] + "\n")
    return counts, faults


def table(counts: Counter[tuple[str, str, str]]) -> str:
    """As Markdown: a row for each pattern."""
    kinds = ("equal", "made again, said, equal", "left out, said", "refused", "WRONG", "BUG", "HANG", "MEMORY")
    names = dict.fromkeys(pattern for pattern in READERS if any(key[0] == pattern for key in counts))
    lines = ["| file | tries | " + " | ".join(map(str.lower, kinds)) + " |", "|---" * (2 + len(kinds)) + "|"]
    for name in (*names, None):
        row = [sum(n for key, n in counts.items() if name in (None, key[0]) and key[2] == kind) for kind in kinds]
        lines.append(f"| {f'`{name}`' if name else '**all**'} | {sum(row)} | {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def command_line() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="patterns that hold this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paired_loss.MOST_IMAGES = 20
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        counts, faults = fuzz(options.tries, options.seed, Path(folder), options.only)
    sys.stdout.write(table(counts) + "\n")
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(command_line())
