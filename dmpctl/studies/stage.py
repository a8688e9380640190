"""One stage of a study: its backbone, how variants are measured against it, and the backbone's own side, made once."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from dmpctl.codecs.text import TextEncoder
from dmpctl.errors import UsageError
from dmpctl.files import locked, make_folder, read_json, read_tensors, sha256_of_json, write_json, write_tensors
from dmpctl.measuring import paired_loss
from dmpctl.measuring.extraction import build_extractor, extract
from dmpctl.measuring.image_sets import images_of
from dmpctl.measuring.paired_loss import epsilon_errors
from dmpctl.metrics.frechet import Factor, features_to_fid, noise_floor
from dmpctl.metrics.moments import FeatureMoments, features_to_moments
from dmpctl.models.backbone import Loaded, load_backbone
from dmpctl.models.build import build_codec
from dmpctl.models.conditions import open_encoder
from dmpctl.models.patched import Patched
from dmpctl.models.sources import open_data
from dmpctl.rng import seed_of
from dmpctl.sampling.generate import in_batches
from dmpctl.settings.measuring import Fid
from dmpctl.settings.model import Settings
from dmpctl.settings.options import defaults_of
from dmpctl.settings.sections import Sampling
from dmpctl.settings.study import Study, settings_of
from dmpctl.training.patch import refuse_sampling
from dmpctl.types import Codec, Extractor, Progress, Silent, Source

SCHEMA_VERSION = 1
TRAINING = ("patch", "pretrain")  # commands whose settings shape a cell
OTHER_SEEDS = 3  # of sampling: how much the backbone's distance moves without any change


@dataclass(frozen=True)
class Side:
    """The backbone measured. `errors` and `tuning_errors` [T, N] float64 at timesteps `steps`, under two noises.

    `features` [M, D] of its samples and `reference` of the real images: None where nothing is sampled.
    """

    errors: Tensor
    tuning_errors: Tensor
    steps: list[int]
    features: Tensor | None
    reference: Factor | None
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A backbone of the study. `settings`: [settings] alone here; `source` is measured on; `extractor` None: no sampling."""

    name: str
    folder: Path
    settings: Settings
    loaded: Loaded
    codec: Codec
    source: Source
    images: int
    extractor: Extractor | None
    text: TextEncoder | None = None
    sides: list[Side] = field(default_factory=list)  # one, once it was made or read

    @property
    def plain(self) -> Patched:
        """The backbone alone."""
        return self.fitted(Patched(self.loaded))

    def fitted(self, model: Patched) -> Patched:
        """A model with the codec, the text encoder and the precision of this stage."""
        return replace(model, codec=self.codec, text=self.text, precision=self.sampling.sample_precision)

    @property
    def sampling(self) -> Sampling:
        return self.settings.sampling

    def noise_seed(self, tuning: bool) -> int:
        """Seed of the paired loss: tuning never sees the noise that is reported on."""
        seed = self.sampling.sample_seed
        return seed_of(seed, "tuning") if tuning else seed

    def protocol(self) -> dict[str, Any]:
        """All that fixes how a model is measured here, JSON-able and flat."""
        found = {
            "backbone_sha256": self.loaded.digest,
            "eval_data": self.source.fingerprint,
            "eval_images": self.images,
            "timesteps": paired_loss.TIMESTEPS,
            "loss_images": min(len(self.source), paired_loss.MOST_IMAGES),
            "sample_seed": self.sampling.sample_seed,
            "sample_precision": self.sampling.sample_precision,
        }
        if self.extractor is not None:
            found |= {"extractor": self.extractor.fingerprint}
            found |= self.sampling.model_dump(mode="json", exclude={"sample_batch", "sample_seed"})
        return found


def open_stage(study: Study, name: str, settings: Settings, device: torch.device) -> Stage:
    """Load a backbone and all it is measured with; whatever does not fit fails here.

    `settings`: the command's own. UsageError, MissingError or IntegrityError as the parts raise them.
    """
    plain = settings_of(study, name).model_copy(update={"launch": settings.launch})
    loaded = load_backbone(plain.base)
    spec, compare = loaded.spec, study.compare
    data = plain.data.model_copy(update={"data": compare.eval_data or plain.data.data})
    codec = build_codec(loaded, plain)
    source = open_data(data, spec, codec, loaded.data)
    if len(source) < 2:
        raise UsageError(f"{study.path}: the images to measure on are {len(source)}, a standard error takes 2")
    extractor = None
    if compare.eval_images:
        refuse_sampling(plain, loaded, source)
        options = Fid(extractor=compare.extractor, extractor_weights=compare.extractor_weights)
        extractor = build_extractor(options, codec.image_shape(spec.latent_shape), device)
    folder = compare.run.expanduser().absolute() / name
    text = open_encoder(plain, spec, loaded.text)
    return Stage(name, folder, plain, loaded, codec, source, compare.eval_images, extractor, text)


def refuse_other(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UsageError if what `path` recorded was shaped by other values.

    A setting that the record does not know is newer than it: it stands at its default there.
    """
    defaults = {name: value for command in TRAINING for name, value in defaults_of(command).items()}
    before = {key: defaults[key] for key in now if key in defaults} | dict(before)
    new = json.loads(json.dumps(now))
    changed = [f"{key}: {before.get(key)} there, {new.get(key)} now" for key in before | new if before.get(key) != new.get(key)]
    if changed:
        raise UsageError(
            f"{path} was made in another way ({'; '.join(changed[:4])})", "name another run in [compare], or restore the file"
        )


def side_of(stage: Stage, device: torch.device, progress: Progress) -> Side | None:
    """The backbone's side: read, or made now and kept on disk. None while another process is making it.

    UsageError if the one on disk was measured in another way.
    """
    if not stage.sides:
        path = stage.folder / "stage.json"
        if not path.is_file():
            make_folder(stage.folder)
            with locked(stage.folder / ".lock", wait=False) as mine:
                if not mine:
                    return None
                if not path.is_file():
                    progress.say(f"{stage.name}: measuring the backbone itself")
                    _write(stage, path, _measured(stage, device))
        stage.sides.append(_read(stage, path))
    return stage.sides[0]


def sampled_features(
    model: Patched, stage: Stage, seed: int, device: torch.device, progress: Progress, extractor: Extractor
) -> Tensor:
    """Features [M, D] of the images that the study samples, with common sampling seeds for every model."""
    sampling = stage.sampling.model_copy(update={"sample_seed": seed})
    settings = stage.settings.model_copy(update={"sampling": sampling})
    model = model.with_prompts(settings, stage.images, progress, stage.source)
    return extract(extractor, (images for _, images in in_batches(model, range(stage.images), sampling, device, progress)))


def _measured(stage: Stage, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors to keep, and figures: the loss, the distance, its sampling noise and the noise floor."""
    quiet = Silent()
    errors, steps = epsilon_errors(stage.plain, stage.source, device, stage.noise_seed(False), quiet)
    other = epsilon_errors(stage.plain, stage.source, device, stage.noise_seed(True), quiet)[0]
    tensors = {"errors": errors, "tuning_errors": other, "steps": torch.tensor(steps)}
    figures: dict[str, Any] = {"paired_loss": float(errors.mean()), "parameters": stage.loaded.spec.parameters, "frechet": None}
    if stage.extractor is not None:
        real = extract(stage.extractor, images_of(stage.source))
        moments, seed = features_to_moments([real]), stage.sampling.sample_seed
        reference = Factor.of(moments)
        features = sampled_features(stage.plain, stage, seed, device, quiet, stage.extractor)
        own = features_to_fid(features, reference)
        others = [
            features_to_fid(sampled_features(stage.plain, stage, seed + k, device, quiet, stage.extractor), reference).value
            for k in range(1, OTHER_SEEDS + 1)
        ]
        figures["frechet"] = {
            **asdict(own),
            "other_seeds": others,
            "seed_sd": stdev([own.value, *others]),
            "noise_floor": noise_floor(real, stage.images, seed),
        }
        tensors |= {"features": features, "mean": moments.mean, "scatter": moments.scatter, "count": torch.tensor(moments.count)}
    return tensors, figures


def _write(stage: Stage, path: Path, measured: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, figures = measured
    digest = write_tensors(path.with_suffix(".safetensors"), tensors)
    shaped_by = stage.protocol()
    about = {"schema_version": SCHEMA_VERSION, "identity": sha256_of_json(shaped_by), "shaped_by": shaped_by}
    write_json(path, {**about, "backbone": stage.loaded.origin, "sha256": digest, **figures})


def _read(stage: Stage, path: Path) -> Side:
    about = read_json(path, SCHEMA_VERSION)
    refuse_other(path, about["shaped_by"], stage.protocol())
    tensors, _ = read_tensors(path.with_suffix(".safetensors"))
    reference = None
    if "features" in tensors:
        reference = Factor.of(FeatureMoments(int(tensors["count"]), tensors["mean"], tensors["scatter"]))
    figures = {key: about[key] for key in ("paired_loss", "parameters", "frechet")}
    return Side(
        tensors["errors"], tensors["tuning_errors"], tensors["steps"].tolist(), tensors.get("features"), reference, figures
    )
