"""Files of reference statistics: ours, and those that other tools have published.

Ours is safetensors: count, mean and scatter of the features, of the spatial ones too where there are any, and a JSON record of
how they were made. Of the others (ADM's npz, pytorch-fid's, clean-fid's, torch-fidelity's) only what a file says is known.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from dmpctl.errors import IntegrityError, NumericalError
from dmpctl.files import json_object, read_tensors, tensor_names, write_tensors
from dmpctl.foreign.tensors import unpickled
from dmpctl.metrics.frechet import Factor, Gaussian
from dmpctl.metrics.moments import FeatureMoments
from dmpctl.metrics.npz import IMAGES, names_of, npz_arrays, npz_images
from dmpctl.words import differences

SCHEMA_VERSION = 1
SUFFIXES = (".npz", ".safetensors", ".pt")
MOMENTS = ("count", "mean", "scatter")
SPATIAL = "spatial."  # before the names of the spatial features' moments
ASYMMETRY = 1e-6  # of the largest number: more is no covariance that was rounded
AGAIN = "write it anew from the images"

Kind = Literal["dmpctl", "adm", "pytorch-fid", "clean-fid", "torch-fidelity"]


@dataclass(frozen=True)
class Statistics:
    """Gaussians of a set of images. `kind`: whose file it is; `protocol`: the one that its numbers belong to, by its own word
    or its name, None where neither says. `images`: how many images the file has beside them. `about`: our record, else {}.
    """

    path: Path
    kind: Kind
    features: Gaussian
    spatial: Gaussian | None = None
    protocol: str | None = None
    images: int = 0
    about: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def count(self) -> int | None:
        """Images behind the statistics, None where the file does not say."""
        return self.features.count

    @property
    def made(self) -> dict[str, JsonValue]:
        """How it was made, which has to be alike before two may be compared; None where it does not say."""
        return {"protocol": self.protocol, "extractor": self.about.get("extractor"), "shape": self.about.get("shape")}


def disagreements(one: Mapping[str, object], two: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """Returns (key, value of one, value of two) wherever both say something, and they differ."""
    return [found for found in differences(one, two) if None not in found]


def write_statistics(path: Path, features: FeatureMoments, spatial: FeatureMoments | None, about: Mapping[str, JsonValue]) -> str:
    """Atomically write our file, `about` (JSON-able) in it; returns its sha256."""
    tensors = _tensors_of(features, "") | ({} if spatial is None else _tensors_of(spatial, SPATIAL))
    return write_tensors(path, tensors, {"schema_version": str(SCHEMA_VERSION), "about": json.dumps(about, sort_keys=True)})


def read_statistics(path: Path, width: int | None = None) -> Statistics:
    """Statistics of a file of any known kind; `width`: how many features there should be, None: any number.

    Raises MissingError if it is not there; IntegrityError where it is damaged, holds something else or pickled objects, has
    another width, or what it holds are no mean and covariance.
    """
    match path.suffix:
        case ".safetensors":
            found = _read_own(path)
        case ".pt":
            found = _read_torch_fidelity(path)
        case _:
            found = _read_npz(path)
    if width is not None and found.features.width != width:
        raise IntegrityError(
            f"{path} has {found.features.width} features, {width} are compared", "use the same extractor for both"
        )
    return found


def is_statistics(path: Path) -> bool:
    """Whether a file holds statistics alone: no images beside them, and no model. IntegrityError if it cannot be opened."""
    if path.suffix == ".npz":
        names = names_of(path)
        return "mu" in names and IMAGES not in names
    return path.suffix == ".safetensors" and set(MOMENTS) <= tensor_names(path)


def _tensors_of(moments: FeatureMoments, prefix: str) -> dict[str, Tensor]:
    return {
        prefix + "count": torch.tensor(moments.count),
        prefix + "mean": moments.mean,
        prefix + "scatter": moments.scatter,
    }


def _read_own(path: Path) -> Statistics:
    tensors, metadata = read_tensors(path)
    version = metadata.get("schema_version", "")
    names = set(MOMENTS)
    if not version.isdecimal() or set(tensors) not in (names, names | {SPATIAL + name for name in names}):
        raise IntegrityError(f"{path} does not hold feature moments", AGAIN)
    if int(version) > SCHEMA_VERSION:
        raise IntegrityError(f"{path} has schema_version {version}, this dmpctl reads up to {SCHEMA_VERSION}", "upgrade dmpctl")
    about = json_object(metadata.get("about", "{}"), f"what {path} says of itself")
    spatial = _moments_in(path, tensors, SPATIAL) if SPATIAL + "count" in tensors else None
    return Statistics(path, "dmpctl", _moments_in(path, tensors, ""), spatial, about.get("protocol"), 0, about)


def _moments_in(path: Path, tensors: Mapping[str, Tensor], prefix: str) -> FeatureMoments:
    count, mean, scatter = (tensors[prefix + name] for name in MOMENTS)
    shapes = count.shape == () and mean.ndim == 1 and scatter.shape == (len(mean), len(mean))
    if not shapes or count.dtype != torch.int64 or {mean.dtype, scatter.dtype} != {torch.float64}:
        raise IntegrityError(f"{path} holds moments of the wrong shape or dtype", AGAIN)
    largest = float(scatter.abs().max()) if scatter.numel() else 0.0
    finite = bool(torch.isfinite(mean).all() and torch.isfinite(scatter).all())
    if int(count) < 0 or not finite or not torch.allclose(scatter, scatter.T, rtol=0, atol=1e-9 * largest):
        raise IntegrityError(f"{path} holds moments that are not finite and symmetric", AGAIN)
    if (scatter.diagonal() < 0).any():
        raise IntegrityError(f"{path} holds a negative variance", AGAIN)
    return FeatureMoments(int(count), mean, scatter)


def _read_npz(path: Path) -> Statistics:
    names = names_of(path)
    if not {"mu", "sigma"} <= names:
        raise IntegrityError(f"{path} holds no mu and sigma; it has {', '.join(sorted(names)[:5]) or 'nothing'}")
    arrays = npz_arrays(path, ("mu", "sigma", "mu_s", "sigma_s"))
    spatial = None
    if {"mu_s", "sigma_s"} <= set(arrays):
        spatial = _gaussian(path, arrays["mu_s"], arrays["sigma_s"], "mu_s", "sigma_s")
    images = npz_images(path).count if IMAGES in names else 0
    clean = protocol_of_name(path.name)
    kind: Kind = "adm" if images or spatial is not None else "clean-fid" if clean else "pytorch-fid"
    features = _gaussian(path, arrays["mu"], arrays["sigma"], "mu", "sigma")
    if features.width == 2048 and bool((features.mean < 0).any()):
        raise IntegrityError(f"{path}: mu has negative numbers, which averages of Inception's features cannot be")
    return Statistics(path, kind, features, spatial, "adm" if kind == "adm" else clean, images)


def protocol_of_name(name: str) -> str | None:
    """The protocol that a clean-fid file's name states (`ffhq_clean_trainval_256.npz`); None where it states none."""
    marks = {"_clean_": "clean", "_legacy_tensorflow_": "adm", "_legacy_pytorch_": "pytorch-fid"}
    return next((protocol for mark, protocol in marks.items() if mark in name), None)


def _read_torch_fidelity(path: Path) -> Statistics:
    """A dict of mu and sigma as torch-fidelity caches it: numpy arrays, the only thing but tensors that is unpickled."""
    found = unpickled(path, "statistics file", AGAIN)
    if not isinstance(found, Mapping) or not {"mu", "sigma"} <= set(found):
        raise IntegrityError(f"{path} holds no mu and sigma", AGAIN)
    return Statistics(path, "torch-fidelity", _gaussian(path, found["mu"], found["sigma"], "mu", "sigma"), protocol="adm")


def _gaussian(path: Path, mu: Any, sigma: Any, mu_name: str, sigma_name: str) -> Factor:
    """The Gaussian of a mean and a covariance as a file has them; IntegrityError, one sentence, where they are none."""
    mean = torch.as_tensor(np.asarray(mu, dtype=np.float64))
    covariance = torch.as_tensor(np.asarray(sigma, dtype=np.float64))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
        raise IntegrityError(
            f"{path}: {mu_name} {list(mean.shape)} and {sigma_name} {list(covariance.shape)} do not fit together"
        )
    for name, values in ((mu_name, mean), (sigma_name, covariance)):
        if not torch.isfinite(values).all():
            raise IntegrityError(f"{path}: {name} has numbers that are not finite")
    if float((covariance - covariance.T).abs().max()) > ASYMMETRY * float(covariance.abs().max()):
        raise IntegrityError(f"{path}: {sigma_name} is not symmetric, so it is no covariance")
    try:
        return Factor.of_covariance(mean, (covariance + covariance.T) / 2)
    except NumericalError as error:
        raise IntegrityError(f"{path}: {sigma_name} is no covariance: {error.message}") from None
