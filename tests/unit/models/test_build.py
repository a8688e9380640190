import zipfile
from dataclasses import replace

import pytest
import torch

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.codecs.identity import Identity
from dmpctl.data.bundled import Digits
from dmpctl.data.source import open_source
from dmpctl.errors import MissingError, UsageError
from dmpctl.methods.dmp import DmpPatch
from dmpctl.methods.full import FullPatch
from dmpctl.methods.lora import LoraPatch
from dmpctl.methods.prompt_tuning import PromptPatch
from dmpctl.models import backbone, build, sources
from dmpctl.runs.records import CodecRecord
from dmpctl.settings.assets import AssetRow, Assets
from dmpctl.settings.methods import Dmp, Full, Lora, PromptTuning
from dmpctl.settings.sections import Base, Data
from dmpctl.types import BackboneSpec, ScheduleSpec, Site
from tests.helpers import settings_for
from tests.unit.data.made import encoded, write_coco

COCO = {"coco-train2014": "train2014", "coco-annotations": "annotations"}


def spec_of(channels: int = 1, size: int = 8, tokens: int = 16, width: int = 32, depth: int = 4) -> BackboneSpec:
    return BackboneSpec((channels, size, size), (Site(tokens, width),) * depth, "epsilon", True, ScheduleSpec(), 0, 1000)


def test_a_patch_adds_what_the_paper_counts():
    """Ham et al. 2025: 6 554 112 parameters for DiT-L/2 on 256 tokens, +1.43 %."""
    with torch.device("meta"):
        model = DiT(DiTConfig(32, 4, 2, 1024, 24, 16, 0))
        patch = build.build_patch(model, Dmp())
    assert isinstance(patch, DmpPatch)
    assert patch.added == 6_554_112
    assert round(100 * patch.added / model.spec.parameters, 2) == 1.43
    assert patch.added == sum(p.numel() for name, p in patch.named_parameters() if name != "w_noise")


@pytest.mark.parametrize(
    ("method", "kind"), [(Dmp(), DmpPatch), (PromptTuning(), PromptPatch), (Lora(rank=2), LoraPatch), (Full(), FullPatch)]
)
def test_every_method_is_built_without_touching_its_backbone(method, kind):
    model = backbone.freeze(DiT(DiTConfig(8, 1, 2, 16, 2, 2, 0)))
    before = backbone.digest_of(model.state_dict())
    patch = build.build_patch(model, method)
    assert isinstance(patch, kind)
    assert backbone.digest_of(model.state_dict()) == before
    assert not any(p.requires_grad for p in model.parameters())


def test_data_defaults_to_what_the_backbone_was_trained_on():
    assert sources.open_data(Data(), spec_of(), Identity(), "digits").fingerprint == Digits().fingerprint
    assert sources.open_data(Data(size=8, channels=1), spec_of(), Identity(), "digits").fingerprint == Digits().fingerprint
    assert sources.open_data(Data(), spec_of(channels=3), Identity(), "digits").item(0)[0].shape == (3, 8, 8)
    with pytest.raises(UsageError, match="nothing says which images"):
        sources.open_data(Data(), spec_of(), Identity(), None)


@pytest.mark.parametrize(
    ("data", "spec", "sentence"),
    [
        (Data(size=16), spec_of(), "takes 8x8 images, --size says 16"),
        (Data(channels=3), spec_of(), "takes images of 1 channels, --channels says 3"),
        (Data(), spec_of(size=16), "8x8 pixels only, not at 16x16"),
    ],
)
def test_data_that_does_not_fit_the_backbone(data, spec, sentence):
    with pytest.raises(UsageError, match=sentence):
        sources.open_data(data, spec, Identity(), "digits")


def test_published_data_is_found_in_the_one_cache(tmp_path, monkeypatch):
    """COCO as it is published, two zip files; the rows are those of the settings."""
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(MissingError, match="coco-train2014") as failure:
        open_source(Data(data="coco"), 8, 3)
    assert failure.value.hint == "run dmpctl download coco-train2014"
    write_coco(tmp_path, "train2014", {f"{n}.png": encoded(n) for n in range(4)})
    for name, inside in (("coco-train2014", "train2014"), ("coco-annotations", "annotations")):
        place = tmp_path / "cache" / "files" / name / f"{inside}.zip"
        place.parent.mkdir(parents=True)
        with zipfile.ZipFile(place, "w") as archive:
            for path in sorted((tmp_path / inside).iterdir()):
                archive.write(path, f"{inside}/{path.name}")
    rows = tuple(AssetRow(name=name, kind="data", file=f"{inside}.zip") for name, inside in COCO.items())
    settings = settings_for("patch").model_copy(update={"assets": Assets(rows=rows)})
    source = sources.open_data(Data(data="coco"), spec_of(channels=3), Identity(), None, settings)
    assert (source.name, len(source), source.item(0)[0].shape) == ("coco-train2014", 4, (3, 8, 8))


def test_the_codec_is_the_one_the_backbone_was_trained_with(tmp_path):
    settings, loaded = settings_for("patch"), backbone.load_backbone(Base())
    assert build.build_codec(loaded, settings).name == "identity"
    latent = replace(loaded, model=backbone.freeze(DiT(DiTConfig(8, 4, 2, 16, 2, 2, 0))))
    with pytest.raises(MissingError, match="vae-ema"):
        build.build_codec(latent, settings)
    recorded = replace(latent, codec=CodecRecord(name="vae-mse", fingerprint="", scale=1.0))
    with pytest.raises(MissingError, match="vae-mse"):
        build.build_codec(recorded, settings)


@pytest.mark.parametrize(
    "method", [Dmp(prompt_init="random"), Dmp(gate="random"), PromptTuning(prompt_init="random"), Lora(rank=2)]
)
def test_a_random_start_is_a_function_of_the_seed(method):
    model = backbone.freeze(DiT(DiTConfig(8, 1, 2, 16, 2, 2, 0)))
    first, again, other = (build.build_patch(model, method, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
