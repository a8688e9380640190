"""`dmpctl doctor`: what this machine has, without opening a connection or writing a file."""

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from dmpctl.runs.rundir import version_of
from dmpctl.settings.model import Settings
from dmpctl.store.cache import cache_dir
from dmpctl.types import Progress, Report

PACKAGES = (
    *("dmpctl", "torch", "torchvision", "accelerate", "diffusers", "timm", "datasets", "huggingface-hub", "safetensors"),
    *("transformers", "torchmetrics", "torch-fidelity", "numpy", "scipy", "scikit-learn", "pillow", "matplotlib"),
    *("peft", "sentencepiece", "pydantic", "typer", "rich", "jinja2", "filelock"),
)
GIB = 1024**3


@dataclass(frozen=True)
class Device:
    """A device; `memory_gib` None: the machine's own. `bf16`: whether it computes in bfloat16."""

    device: str
    name: str
    memory_gib: float | None
    bf16: bool

    def __str__(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib} GiB"
        return f"{self.name}{memory}, bf16 {'yes' if self.bf16 else 'no'}"


@dataclass(frozen=True)
class Place:
    """A folder that dmpctl writes to, and the free disk there."""

    what: str
    path: str
    exists: bool
    free_gib: float

    def __str__(self) -> str:
        return f"{self.path}{'' if self.exists else ' (not there yet)'}, {self.free_gib} GiB free"


def examine(settings: Settings, _: Progress) -> Report:
    """Versions, devices, threads, caches, offline state and free disk. A package that does not import is a finding."""
    versions, offline, said = {name: version_of(name) for name in PACKAGES}, settings.console.offline, list[str]()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # fewer under SLURM
    found, threads = list[Device](), {"cores": os.cpu_count(), "usable": usable}
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        about: dict[str, str | None] = {"torch_error": " ".join(str(error).split())}
        said.append(f"torch does not import: {about['torch_error']}")
    else:
        found, threads["torch"] = devices(), torch.get_num_threads()
        about = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "cuda_runtime": torch.version.cuda}
        said += ["no GPU: commands run on the CPU"] if len(found) == 1 else []
    if missing := [name for name, number in versions.items() if number == "not installed"]:
        said.append(f"not installed: {', '.join(missing)}")
    system, places = {"python": sys.version.split()[0], "platform": platform.platform()}, folders()
    passive = os.environ.get("OMP_WAIT_POLICY") == "PASSIVE"
    data = {
        **system,
        "versions": versions,
        "threads": threads,
        "offline": offline,
        "devices": list(map(asdict, found)),
        **about,
    }
    rows = {**system, **versions, **{one.device: str(one) for one in found}}
    rows["threads"] = f"{threads['usable']} of {threads['cores']} cores usable, torch uses {threads.get('torch', 'none')}"
    rows["threads"] += f", which wait {'passively' if passive else 'actively'}"
    rows |= {**{place.what: str(place) for place in places}, "offline": "yes" if offline else "no"}
    table = tuple({"what": what, "found": value} for what, value in rows.items())
    return Report({**data, "folders": list(map(asdict, places))}, table, tuple(said))


def devices() -> list[Device]:
    """Returns every device that torch knows here."""
    import torch

    found = [Device("cpu", platform.processor() or platform.machine(), None, True)]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        native = about.major >= 8  # compute capability 8.0: Ampere
        found.append(Device(f"cuda:{index}", about.name, round(about.total_memory / GIB, 1), native))
    if torch.backends.mps.is_available():
        try:
            torch.zeros(1, dtype=torch.bfloat16, device="mps")  # depends on the version of macOS: try
            native = True
        except (RuntimeError, TypeError):
            native = False
        found.append(Device("mps", "Apple GPU", None, native))
    return found


def folders() -> list[Place]:
    """Returns the caches that downloads go to, and the working directory."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found = []
    places: dict[str, str | Path] = {"dmpctl cache": cache_dir(), "hub cache": HF_HUB_CACHE, "working directory": "."}
    for what, place in places.items():
        path = Path(place).expanduser().absolute()
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        found.append(Place(what, str(path), path.exists(), round(shutil.disk_usage(there).free / GIB, 1)))
    return found
