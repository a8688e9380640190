"""One stage of a study: its backbone, how variants are measured against it, and the backbone's own side, made once."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import stdev

import torch
from torch import Tensor

from dmpctl.codecs.text import TextEncoder
from dmpctl.comparing import paired_loss
from dmpctl.comparing.paired_loss import epsilon_errors
from dmpctl.errors import Damaged, UsageError
from dmpctl.files import locked, make_folder, put_aside, read_tensors, sha256_of, sha256_of_json, write_json, write_tensors
from dmpctl.images.stored import images_of
from dmpctl.measuring.features import build_extractor, extract
from dmpctl.metrics.frechet import Factor, features_to_fid, noise_floor, refuse_few
from dmpctl.metrics.moments import FeatureMoments, features_to_moments
from dmpctl.models.backbone import Loaded, load_backbone
from dmpctl.models.build import build_codec
from dmpctl.models.conditions import open_encoder
from dmpctl.models.patched import Patched
from dmpctl.models.sources import open_data
from dmpctl.rng import seed_of
from dmpctl.runs.records import read_record
from dmpctl.sampling.generate import in_batches
from dmpctl.settings.measuring import Fid, Sampling
from dmpctl.settings.model import Settings
from dmpctl.studies.results import SampledDistance, StageRecord, refuse_other
from dmpctl.studies.study import Study, settings_of
from dmpctl.training.patch import refuse_sampling
from dmpctl.types import Codec, Extractor, Progress, Silent, Source

SCHEMA_VERSION = 1
OTHER_SEEDS = 3  # of sampling: how much the backbone's distance moves without any change


@dataclass(frozen=True)
class Side:
    """The backbone measured. `errors` and `tuning_errors` [T, N] float64 at T timesteps, under two noises.

    `features` [M, D] of its samples and `reference` of the real images: None where nothing is sampled.
    """

    record: StageRecord
    errors: Tensor
    tuning_errors: Tensor
    features: Tensor | None
    reference: Factor | None


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
    device: torch.device
    extractor: Extractor | None
    text: TextEncoder | None = None

    def fitted(self, model: Patched) -> Patched:
        """A model with the codec, the text encoder and the precision of this stage."""
        return replace(model, codec=self.codec, text=self.text, precision=self.sampling.sample_precision)

    @property
    def sampling(self) -> Sampling:
        return self.settings.sampling

    def protocol(self) -> dict[str, object]:
        """All that fixes how a model is measured here, JSON-able and flat."""
        found: dict[str, object] = {
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

    def errors(self, model: Patched, tuning: bool) -> tuple[Tensor, list[int]]:
        """Errors [T, N] of a model and their timesteps; tuning never sees the noise that is reported on."""
        seed = self.sampling.sample_seed
        return epsilon_errors(model, self.source, self.device, seed_of(seed, "tuning") if tuning else seed, Silent())

    def sampled_features(self, model: Patched, extractor: Extractor, seeds_later: int = 0) -> Tensor:
        """Features [M, D] of the images that the study samples, with common sampling seeds for every model."""
        sampling = self.sampling.model_copy(update={"sample_seed": self.sampling.sample_seed + seeds_later})
        settings = self.settings.model_copy(update={"sampling": sampling})
        model = model.with_prompts(settings, self.images, Silent(), self.source)
        batches = in_batches(model, range(self.images), sampling, self.device, Silent())
        return extract(extractor, (images for _, images in batches))


def open_stage(study: Study, name: str, settings: Settings, device: torch.device, progress: Progress) -> Stage:
    """Load a backbone and all it is measured with; whatever does not fit fails here.

    `settings`: the command's own. UsageError, MissingError or IntegrityError as the parts raise them.
    """
    plain = settings_of(study, name).model_copy(update={"launch": settings.launch})
    loaded = load_backbone(plain.base)
    spec, compare = loaded.spec, study.compare
    data = plain.data.model_copy(update={"data": compare.eval_data or plain.data.data})
    codec = build_codec(loaded, plain)
    source = open_data(data, spec, codec, loaded.data, progress=progress)
    if len(source) < 2:
        raise UsageError(f"{study.path}: the images to measure on are {len(source)}, a standard error takes 2")
    extractor = None
    if compare.eval_images:
        refuse_sampling(plain, loaded, source)
        options = Fid(extractor=compare.extractor, extractor_weights=compare.extractor_weights)
        extractor = build_extractor(options, codec.image_shape(spec.latent_shape), device, settings)
        refuse_few(compare.eval_images, extractor.width, "or set eval_images to 0")
    folder = compare.run.expanduser().absolute() / name
    text = open_encoder(plain, spec, loaded.text)
    return Stage(name, folder, plain, loaded, codec, source, compare.eval_images, device, extractor, text)


def side_of(stage: Stage, progress: Progress) -> Side | None:
    """Returns the backbone's side: read, or made now and kept on disk. None while another process is making it.

    UsageError if the one on disk was measured in another way.
    """
    path = stage.folder / "stage.json"
    if not path.is_file():
        make_folder(stage.folder)
        with locked(stage.folder / ".lock", wait=False) as mine:
            if not mine:
                return None
            if not path.is_file():
                progress.say(f"{stage.name}: measuring the backbone itself")
                _measure(stage, path)
    beside = path.with_suffix(".safetensors")
    try:
        record = read_record(path, StageRecord)
        refuse_other(path, record.shaped_by, stage.protocol())
        tensors, _ = read_tensors(beside)
        if (found := sha256_of(beside)) != record.sha256:
            raise Damaged(f"{beside} is damaged: sha256 {found}, expected {record.sha256}")
    except Damaged as error:
        progress.say(f"warning: {error.message}; put aside as {put_aside(path).name}, the backbone is measured again")
        return side_of(stage, progress)
    reference = None
    if "features" in tensors:
        reference = Factor.of(FeatureMoments(int(tensors["count"]), tensors["mean"], tensors["scatter"]))
    return Side(record, tensors["errors"], tensors["tuning_errors"], tensors.get("features"), reference)


def _measure(stage: Stage, path: Path) -> None:
    """Write the backbone's tensors, then stage.json: its loss, its distance with the sampling noise, and the noise floor."""
    alone = stage.fitted(Patched(stage.loaded))
    errors, steps = stage.errors(alone, tuning=False)
    other, _ = stage.errors(alone, tuning=True)
    tensors, distance = {"errors": errors, "tuning_errors": other, "steps": torch.tensor(steps)}, None
    if stage.extractor is not None:
        real = extract(stage.extractor, images_of(stage.source))
        moments = features_to_moments([real])
        reference = Factor.of(moments)
        features, *others = (stage.sampled_features(alone, stage.extractor, later) for later in range(1 + OTHER_SEEDS))
        own, moved = features_to_fid(features, reference, debias=True), [features_to_fid(one, reference).value for one in others]
        floor = noise_floor(real, stage.images, stage.sampling.sample_seed)
        distance = SampledDistance(**asdict(own), other_seeds=moved, seed_sd=stdev([own.value, *moved]), noise_floor=floor)
        tensors |= {"features": features, "mean": moments.mean, "scatter": moments.scatter, "count": torch.tensor(moments.count)}
    shaped_by = stage.protocol()
    record = StageRecord(
        schema_version=SCHEMA_VERSION,
        identity=sha256_of_json(shaped_by),
        shaped_by=shaped_by,
        backbone=stage.loaded.origin,
        sha256=write_tensors(path.with_suffix(".safetensors"), tensors),
        paired_loss=float(errors.mean()),
        parameters=stage.loaded.spec.parameters,
        frechet=distance,
    )
    write_json(path, record.to_json())
