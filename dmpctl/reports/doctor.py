"""`dmpctl doctor`: what this machine has, without opening a connection or writing a file."""

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from dmpctl.runs.rundir import version_of
from dmpctl.settings.model import Settings
from dmpctl.store.cache import cache_dir
from dmpctl.types import Report

PACKAGES = (
    *("dmpctl", "torch", "torchvision", "accelerate", "diffusers", "timm", "datasets", "huggingface-hub", "safetensors"),
    *("transformers", "torchmetrics", "torch-fidelity", "numpy", "scipy", "scikit-learn", "pillow", "matplotlib"),
    *("pydantic", "typer", "rich"),
)
GIB = 1024**3


def examine(settings: Settings) -> Report:
    """Versions, devices, threads, caches, offline state and free disk. A package that does not import is a finding."""
    data: dict[str, Any] = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "threads": {"cores": os.cpu_count(), "usable": usable_cores()},
        "offline": settings.console.offline,
        "devices": [],
    }
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        data["torch_error"] = " ".join(str(error).split())
    else:
        data["threads"]["torch"] = torch.get_num_threads()
        data["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        data["cuda_runtime"] = torch.version.cuda
        data["devices"] = devices(torch)
    data["folders"] = folders()
    return Report(data, tuple(rows(data)), tuple(remarks(data)))


def usable_cores() -> int:
    """Cores that this process may use: less than the machine has in a container or under SLURM."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(torch: Any) -> list[dict[str, Any]]:
    """Every device: name, memory in GiB (None: the machine's own) and whether it computes in bfloat16."""
    name = platform.processor() or platform.machine()
    found: list[dict[str, Any]] = [{"device": "cpu", "name": name, "memory_gib": None, "bf16": True}]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = round(about.total_memory / GIB, 1)
        native = about.major >= 8  # compute capability 8.0: Ampere
        found.append({"device": f"cuda:{index}", "name": about.name, "memory_gib": memory, "bf16": native})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "memory_gib": None, "bf16": mps_bf16(torch)})
    return found


def mps_bf16(torch: Any) -> bool:
    """bfloat16 on an Apple GPU depends on the version of macOS: try."""
    try:
        torch.zeros(1, dtype=torch.bfloat16, device="mps")
    except (RuntimeError, TypeError):
        return False
    return True


def folders() -> list[dict[str, Any]]:
    """The caches that downloads go to, and the working directory, each with free disk in GiB."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places: dict[str, str | Path] = {"dmpctl cache": cache_dir(), "hub cache": HF_HUB_CACHE, "working directory": "."}
    found = []
    for what, place in places.items():
        path = Path(place).expanduser().absolute()
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        free = round(shutil.disk_usage(there).free / GIB, 1)
        found.append({"what": what, "path": str(path), "exists": path.exists(), "free_gib": free})
    return found


def rows(data: dict[str, Any]) -> list[dict[str, str]]:
    """The same as a table of two columns."""
    found = {"python": data["python"], "platform": data["platform"], **data["versions"]}
    for device in data["devices"]:
        memory = "" if device["memory_gib"] is None else f", {device['memory_gib']} GiB"
        found[device["device"]] = f"{device['name']}{memory}, bf16 {'yes' if device['bf16'] else 'no'}"
    threads = data["threads"]
    found["threads"] = f"{threads['usable']} of {threads['cores']} cores usable, torch uses {threads.get('torch', 'none')}"
    for folder in data["folders"]:
        found[folder["what"]] = f"{folder['path']}{'' if folder['exists'] else ' (not there yet)'}, {folder['free_gib']} GiB free"
    found["offline"] = "yes" if data["offline"] else "no"
    return [{"what": what, "found": value} for what, value in found.items()]


def remarks(data: dict[str, Any]) -> list[str]:
    """Sentences about what stands in the way."""
    said = []
    if "torch_error" in data:
        said.append(f"torch does not import: {data['torch_error']}")
    elif len(data["devices"]) == 1:
        said.append("no GPU: commands run on the CPU")
    missing = [name for name, number in data["versions"].items() if number == "not installed"]
    if missing:
        said.append(f"not installed: {', '.join(missing)}")
    return said
