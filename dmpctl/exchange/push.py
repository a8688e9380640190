"""`dmpctl push`: a patch on the Hub, in one commit, with a card that says what it is, its numbers and its licence."""

import os
from collections.abc import Mapping
from pathlib import Path

from dmpctl.errors import MissingError, UsageError
from dmpctl.files import read_json, tensors_to_bytes
from dmpctl.measuring.record import SCHEMA_VERSION as RECORDS
from dmpctl.measuring.record import sampling_words
from dmpctl.measuring.verdict import distance_words
from dmpctl.models.backbone import metadata_of
from dmpctl.models.patch_files import load_patch, read_patch_record
from dmpctl.models.patched import Patched
from dmpctl.runs.records import PatchRecord
from dmpctl.settings.model import Settings
from dmpctl.store.addresses import HubAddress, address_in, of_files
from dmpctl.store.https import Again
from dmpctl.store.hub import failure
from dmpctl.store.locate import BUNDLED
from dmpctl.store.registry import shipped
from dmpctl.types import Progress, Report
from dmpctl.words import fit_to_show

TAGS = ("diffusion", "diffusion-model-patching", "dmp", "dmpctl")
USAGE = """```bash
pip install dmpctl
dmpctl download {address}
dmpctl sample {address}
dmpctl fid {address}
```

```python
import dmpctl

patched = dmpctl.load_patch("{address}")
images = dmpctl.sample(patched, 16, sampler="ddim", steps=50)
```"""


def push(settings: Settings, what: list[str], progress: Progress) -> Report:
    """Publish the patch of a run as hf://OWNER/NAME (`what`: these two); the same again changes nothing but makes a commit.

    UsageError where others could not have the backbone; MissingError where the Hub refuses.
    """
    if len(what) != 2:
        raise UsageError("push takes a run and where it goes", "dmpctl push runs/digits hf://OWNER/NAME")
    run, to = what
    path, options = Path(run).expanduser().absolute(), settings.push
    at = of_files(to)
    if at.dataset or at.file is not None or at.revision is not None:
        raise UsageError(f"{to} is no place for a patch on the Hub", "write hf://OWNER/NAME")
    model = load_patch(path)
    files = files_of(path, model, to, options.push_backbone)
    sizes = {name: len(content) for name, content in files.items()}
    data = {"run": str(path), "to": to, "files": sizes, "step": model.step}
    row_shown = {"to": to, "files": ", ".join(sizes), "size": f"{sum(sizes.values()) / 1e6:.3g} MB"}
    if settings.console.dry_run:
        return Report({"dry_run": True, **data}, (row_shown,), ("dry run: nothing was sent",))
    if settings.console.offline:
        raise UsageError("--offline forbids sending anything", "leave --offline out")
    commit = _sent(at, files, model.step, options.private)
    return Report({**data, "commit": commit}, (row_shown,), (f"use it by its address: dmpctl sample {to}@{commit}",))


def files_of(path: Path, model: Patched, to: str, with_backbone: bool) -> dict[str, bytes]:
    """Returns the published files by name. None of them holds a path of this machine."""
    record = read_patch_record(path)
    base = record.backbone.base
    if not with_backbone and not (base in BUNDLED or base in shipped() or address_in(base) is not None):
        raise UsageError(
            f"the backbone of {path} is {base}, which others do not have", "add --with-backbone, or patch a published one"
        )
    data = record.data.model_copy(update={"name": _public_name(str(record.data.name))})
    backbone = record.backbone.model_copy(update={"weights": None})
    files: dict[str, bytes] = {"patch.safetensors": (path / "patch.safetensors").read_bytes()}
    if with_backbone:
        loaded = model.backbone
        files["backbone.safetensors"] = tensors_to_bytes(loaded.model.state_dict(), metadata_of(loaded, record.codec))
        backbone = backbone.model_copy(update={"base": "backbone.safetensors"})
    tools = {
        name: tool.model_copy(update={"name": _public_name(tool.name)})
        for name, tool in (("codec", record.codec), ("text", record.text))
        if tool is not None
    }
    record = record.model_copy(update={"data": data, "backbone": backbone, **tools})
    files["patch.json"] = record.to_bytes()
    files["README.md"] = fit_to_show(card(path, record, to)).encode()
    return files


def _public_name(name: str) -> str:
    """The name of data or of a codec; of a folder of this machine its last part alone."""
    return Path(name).name if name.startswith("/") else name


def card(path: Path, record: PatchRecord, to: str) -> str:
    """README.md: front matter as the Hub reads it, then what the patch is, how to use it, and its numbers with their protocol."""
    from huggingface_hub import ModelCardData

    backbone, method = record.backbone, record.method.method
    row, data_row = shipped().get(backbone.base), shipped().get(str(record.data.name))
    licence = row.licence if row is not None else None
    head = ModelCardData(
        library_name="dmpctl",
        tags=list(TAGS),
        license="other" if licence else None,
        license_name=licence.lower() if licence else None,
        base_model=row.repo if row is not None else None,
        datasets=[data_row.repo] if data_row is not None and data_row.repo and data_row.dataset else None,
    )
    known = {"backbone": row, "data": data_row}  # a patch of a backbone is bound by both
    licences = [f"- {what}: {found.licence}" for what, found in known.items() if found is not None and found.licence]
    lines = [
        f"---\n{head.to_yaml()}\n---",
        f"# {to.rsplit('/', 1)[-1]}",
        f"A patch of [Diffusion Model Patching](https://arxiv.org/abs/2405.17825) (method `{method}`) for the frozen backbone "
        f"`{backbone.base}`, trained to step {record.step} on `{record.data.name}`. It adds {record.added_words} "
        f"and fits this backbone alone (sha256 `{backbone.sha256}`).",
        "## Use",
        USAGE.format(address=to),
        "## Numbers",
        *_numbers(path),
        "## Licence",
        "\n".join(licences) or "The licences of backbone and data are not known to dmpctl: ask whoever published them.",
    ]
    return "\n\n".join(lines) + "\n"


def _numbers(path: Path) -> list[str]:
    """Returns a line for each number that the run has measured, with its protocol."""
    found = []
    for file in sorted(path.glob("metrics/*.json")):
        record = read_json(file, RECORDS)
        if "paired_loss_verdict" in record:
            if record["difference"]:
                found.append(f"- Against its backbone on the same seeds, {record['metric']}: {record['verdict']}.")
            found.append(f"- Denoising loss: {record['paired_loss_verdict']}.")
        elif "reference" in record and "value" in record:
            protocol = ", ".join(filter(None, (record["protocol"]["name"], sampling_words(record.get("sampling")))))
            against = f"{_public_name(str(record['reference']['name']))} (protocol {protocol})"
            value = distance_words(record["value"], record.get("debiased"), record.get("standard_error"))
            found.append(f"- {record['metric']}: {value} against {against}.")
    return ["\n".join(found)] if found else ["Nothing was measured."]


def _sent(at: HubAddress, files: Mapping[str, bytes], step: int, private: bool) -> str:
    """Make the repository if it is not there, and one commit; its hash."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repo = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="dmpctl"), at.repo
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        found = api.create_commit(repo, operations, commit_message=f"Patch at step {step}, by dmpctl")
    except Exception as error:
        cause = failure(at, error)
        if isinstance(cause, Again):
            cause = MissingError(f"{at.page} cannot be reached ({cause})", "try again later")
        raise cause from None
    return str(found.oid)
