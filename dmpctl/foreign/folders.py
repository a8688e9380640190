"""Files of weights in a folder as diffusers and transformers save it: which ones are read, and that their numbers are sound."""

import re
from pathlib import Path

from dmpctl.errors import IntegrityError
from dmpctl.files import read_tensors
from dmpctl.foreign.tensors import refuse_unsound, unpickled

MODEL, ENCODER = "diffusion_pytorch_model", "model"  # the stems of their names


def variant_of(folder: Path, stem: str = MODEL) -> str | None:
    """The variant (`fp16`) that weights are read in, where they lie there in no other; None: in the plain one, or not at all.

    IntegrityError where there are several, and nothing says which.
    """
    found = _files(folder, stem)
    if None in found or not found:
        return None
    if len(found) > 1:
        raise IntegrityError(f"{folder} holds weights as {' and '.join(sorted(map(str, found)))}", "keep one of them there")
    return next(iter(found))


def refuse_unsound_files(folder: Path, suffix: str = ".safetensors", stem: str = MODEL, floats: bool = True) -> None:
    """IntegrityError for files of this suffix that no layer can take, or a pickle of more; `floats` as in `refuse_unsound`."""
    for path in _files(folder, stem).get(variant_of(folder, stem), []):
        if path.suffix == suffix:
            refuse_unsound(unpickled(path) if suffix == ".bin" else read_tensors(path)[0], path, floats)


def _files(folder: Path, stem: str) -> dict[str | None, list[Path]]:
    """Files of weights by variant, without pickles where the same lies there as safetensors."""
    pattern = re.compile(rf"{stem}(?:\.([A-Za-z]\w*))?(?:-\d+-of-\d+)?(?:\.([A-Za-z]\w*))?\.(?:safetensors|bin)")
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            found.setdefault(match[1] or match[2], []).append(path)
    safe = {variant: [path for path in paths if path.suffix == ".safetensors"] for variant, paths in found.items()}
    return {variant: safe[variant] or paths for variant, paths in found.items()}
