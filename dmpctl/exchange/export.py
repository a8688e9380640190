"""`dmpctl export`: a run's result in a form for others: the patch alone, one file with its backbone, or the published layout."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

import torch

from dmpctl.backbones.dit import DiT
from dmpctl.backbones.dit_weights import PATCH
from dmpctl.backbones.told import infer_config
from dmpctl.errors import UsageError
from dmpctl.files import make_folder, sha256_of_bytes, tensors_to_bytes, write_atomic
from dmpctl.models.backbone import Loaded, metadata_of
from dmpctl.models.build import PatchModule
from dmpctl.models.patch_files import FOLDED, PATCH_PREFIX, load_result, outputs_of
from dmpctl.runs.records import PatchRecord
from dmpctl.settings.methods import Dmp, Full, Lora, Method, PromptTuning
from dmpctl.settings.model import Settings
from dmpctl.types import Progress, Report

PUBLISHED_STEPS = 1000  # of the published code's noise schedules


def export(settings: Settings, run: Path, progress: Progress) -> Report:
    """Write a run's patch as --to says, into the run or to --out; the same export again changes nothing.

    UsageError where the target holds something else, or the form cannot hold this patch.
    """
    model = load_result(run, settings.result.result_weights)
    if model.patch is None or model.record is None:
        raise UsageError(f"{run} holds a backbone without a patch, which needs no export", "name a run of dmpctl patch")
    method, form = model.record.method, settings.exporting.to
    exports = outputs_of(run) / "exports"
    match form:
        case "patch":
            target = settings.images.out or exports / "patch"
            tensors, folder = tensors_to_bytes(model.patch.state_dict()), target.expanduser().absolute()
            record = model.record.model_copy(update={"sha256": sha256_of_bytes(tensors)})  # raw weights: it was a checkpoint's
            files = {folder / "patch.safetensors": tensors, folder / "patch.json": record.to_bytes()}
        case "merged":
            target = settings.images.out or exports / "merged.safetensors"
            files = {_with_suffix(target, ".safetensors"): _merged(model.backbone, model.patch, model.record)}
        case "dmp-pt":
            target = settings.images.out or exports / f"{model.step:07d}.pt"
            files = {_with_suffix(target, ".pt"): _published(model.backbone, model.patch, method)}
        case _:
            assert_never(form)
    out = str(target.expanduser().absolute())
    made = {path.name: {"bytes": len(content), "sha256": sha256_of_bytes(content)} for path, content in files.items()}
    data = {"out": out, "form": form, "method": method.method, "step": model.step, "files": made}
    row = {"form": form, "method": method.method, "size": f"{sum(map(len, files.values())) / 1e6:.3g} MB", "out": out}
    if settings.console.dry_run:
        return Report({"dry_run": True, **data}, (row,), ("dry run: nothing was written",))
    written = put_all(files)
    return Report(data, (row,), (f"written: {out}" if written else f"it was there already: {out}",))


def put_all(files: Mapping[Path, bytes]) -> bool:
    """Write files in order, each by one rename; whether any was not there. UsageError, before a write, where one differs."""
    for path, content in files.items():
        if path.is_dir():
            raise UsageError(f"{path} is a folder, a file goes here", "name a file with --out")
        if path.is_file() and (path.stat().st_size != len(content) or path.read_bytes() != content):
            raise UsageError(f"{path} is there already and holds something else", "name another place, or remove it")
    missing = [path for path in files if not path.is_file()]
    for path in missing:
        make_folder(path.parent)
        write_atomic(path, files[path])
    return bool(missing)


def _with_suffix(target: Path, suffix: str) -> Path:
    """The absolute target; UsageError for a name that other commands would not know for such a file."""
    if target.suffix != suffix:
        raise UsageError(f"--out {target} should end with {suffix}", f"name it {target.name}{suffix}")
    return target.expanduser().absolute()


def _merged(backbone: Loaded, patch: PatchModule, record: PatchRecord) -> bytes:
    """One safetensors file: a backbone with the change folded in; or, with prompts, the backbone's tensors and patch.*."""
    metadata = metadata_of(backbone, record.codec, record.text)
    folded = patch.merged()
    if folded is not None:
        return tensors_to_bytes(folded, metadata | {FOLDED: record.method.method})
    beside = {PATCH_PREFIX + name: value for name, value in patch.state_dict().items()}
    described = {**record.to_json(), "sha256": sha256_of_bytes(tensors_to_bytes(patch.state_dict()))}
    metadata |= {PATCH: json.dumps(described, sort_keys=True)}
    return tensors_to_bytes({**backbone.model.state_dict(), **beside}, metadata)


def _published(backbone: Loaded, patch: PatchModule, method: Method) -> bytes:
    """A checkpoint of the published code: model and ema (both these weights), and its config as plain values."""
    network = backbone.model
    if not isinstance(network, DiT):
        raise UsageError("the published layout is that of a DiT, this backbone is a model of diffusers", "use --to merged")
    options = _unpublished(method)
    if isinstance(method, Lora | Full) or options:
        raise UsageError(f"the published layout has no {options[0]}", "export it with --to merged, or --to patch")
    if (steps := backbone.spec.schedule.steps) != PUBLISHED_STEPS:
        raise UsageError(f"the published code has {PUBLISHED_STEPS} noise steps, this backbone {steps}")
    if infer_config(network.state_dict(), network.config.num_heads) != network.config:
        raise UsageError("the published layout cannot say that labels are never dropped, as they are not in this backbone")
    state = {**network.state_dict(), **patch.state_dict()}
    buffer = io.BytesIO()
    torch.save({"model": state, "ema": state, "config": _config(network, method)}, buffer)
    return buffer.getvalue()


def _unpublished(method: Method) -> list[str]:
    """The options of this method that the published code does not have."""
    if isinstance(method, Lora | Full):
        return [f"--method {method.method}"]
    options = {f"--prompt-sites {method.prompt_sites}": method.prompt_sites is not None}
    if isinstance(method, Dmp):
        seen = "t" if method.position == "prepend" else "t+y"
        options |= {
            f"--prompt-sets {method.prompt_sets}": method.prompt_sets is not None,
            f"--prompt-rank {method.prompt_rank}": method.prompt_rank is not None,
            f"--gate {method.gate}": method.gate not in ("soft", "topk"),
            "--gate-per-site": method.gate_per_site,
            f"--gate-scale {method.gate_scale}": method.gate_scale not in (None, 1.0),
            f"--gate-input {method.gate_input} with --position {method.position}": method.gate_input not in (None, seen),
        }
    return [option for option, used in options.items() if used]


def _config(model: DiT, method: Dmp | PromptTuning) -> dict[str, dict[str, object]]:
    """The published config's names, as far as they describe the model; num_heads is an addition: no tensor shows it."""
    config = model.config
    prompts = method.prompts or config.tokens
    kept = method.topk if isinstance(method, Dmp) else None
    patch = {
        "num_tokens": prompts,
        "topk": _fraction(kept or prompts, prompts),
        "type": method.position,
        "uncond": not config.num_classes,
        "gate_type": "linear" if isinstance(method, Dmp) else "PT",
        "pt_depth": method.prompt_depth or config.depth,
    }
    param = {"num_classes": config.num_classes or 1, "latent_size": config.input_size, "num_heads": config.num_heads}
    if model.schedule.kind == "flow":  # an addition, too: no tensor shows the direction of time
        param |= {"from_data": config.from_data}
    return {"general": {"schedule_name": model.schedule.kind}, "models": {"param": param, "vp": patch}}


def _fraction(kept: int, prompts: int) -> float:
    """kept / prompts, so that the published int(fraction * prompts) gives `kept` back."""
    share = kept / prompts
    return share if int(share * prompts) == kept else math.nextafter(share, 1)
