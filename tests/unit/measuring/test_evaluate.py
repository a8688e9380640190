import json
import shutil

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from dmpctl.data.bundled import Digits
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.images.stored import images_of
from dmpctl.measuring import evaluate, features
from dmpctl.measuring.scores import metric_name
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.models.patch_files import load_patch
from dmpctl.sampling.generate import generate
from dmpctl.types import Silent
from tests.helpers import copied, digit_folder, files, settings_for

FAST = {"sampler": "ddim", "steps": 3, "sample_batch": 64, "cpu": True}


def fid(what, **given):
    return evaluate.fid(settings_for("fid", **{**FAST, **given}), str(what), Silent())


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return digit_folder(tmp_path_factory.mktemp("real") / "digits")


@pytest.fixture
def run(finished, tmp_path):
    return copied(finished, tmp_path / "run")


def published_formula(one: torch.Tensor, two: torch.Tensor) -> float:
    """torchmetrics' distance of features [N, D], from means and covariances."""
    stats = [(x.double().mean(0), torch.cov(x.double().T)) for x in (one, two)]
    return float(_compute_fid(*stats[0], *stats[1]))


def test_real_images_against_themselves(real):
    report = fid(real, reference="digits")
    assert report.data["metric"] == "fd-pixels-1797"
    assert abs(report.data["value"]) < 1e-6
    assert (report.data["n"], report.data["n_reference"]) == (1797, 1797)
    assert report.data["reference"]["fingerprint"] == Digits().fingerprint
    assert fid(real, reference=str(real)).data["value"] < 1e-6


def test_a_run_against_the_published_formula(run):
    report = fid(run, max_images=200)
    images = generate(load_patch(run), range(200), settings_for("fid", **FAST).sampling, torch.device("cpu"))
    extractor = Pixels(1, 8)
    expected = published_formula(extractor(images), extractor(Digits().images()))
    assert report.data["value"] == pytest.approx(expected, rel=1e-4)
    assert report.data["metric"] == "fd-pixels-200"
    assert report.data["standard_error"] > 0
    assert report.data["debiased"] < report.data["value"]


def test_what_a_run_records(run, finished):
    report = fid(run, max_images=80, stream=True)
    (name,) = {name for name in files(run) - files(finished) if "/features/" not in name}
    assert name.startswith("metrics/fd-pixels-80-0000006-ddim-3-cfg1-seed0-")
    found = json.loads((run / name).read_text())
    assert found.pop("measured").startswith("20")
    assert len(found.pop("sealed")) == 64
    assert found == json.loads(json.dumps(report.data))
    wanted = {"metric", "value", "standard_error", "n", "n_reference", "metrics", "protocol", "reference", "images", "sampling"}
    assert wanted | {"codec", "patch", "arithmetic", "versions", "warnings"} < set(found)
    assert found["protocol"] == {
        "name": "pixels",
        "extractor": Pixels(1, 8).fingerprint,
        "shape": [1, 8, 8],
        "published_images": None,
        "inception_score_split_size": None,
    }
    assert found["patch"]["patch_sha256"] == json.loads((run / "patch.json").read_text())["sha256"]
    assert found["sampling"]["steps"] == 3
    assert found["reference"]["name"] == "digits"  # the run's own data
    assert found["reference"]["fingerprint"] == Digits().fingerprint


def test_images_are_made_once_and_those_of_sample_are_used(run, monkeypatch):
    first = fid(run, max_images=70).data
    made = {name for name in files(run) if name.endswith(".png") and name.startswith("samples/")}
    assert {f"samples/0000006-ddim-3-cfg1/{k:06d}.png" for k in range(70)} <= made
    shutil.rmtree(run / "metrics")
    monkeypatch.setattr("dmpctl.sampling.generate.generate", lambda *_, **__: pytest.fail("an image was made again"))
    assert fid(run, max_images=70).data["value"] == pytest.approx(first["value"], rel=1e-9)


def test_streaming_writes_no_image_and_gives_the_same_number(run):
    shutil.rmtree(run / "samples", ignore_errors=True)
    streamed = fid(run, max_images=70, stream=True).data["value"]
    assert not (run / "samples").exists()
    shutil.rmtree(run / "metrics")
    assert fid(run, max_images=70).data["value"] == pytest.approx(streamed, rel=1e-9)


def test_a_backbone_is_measured_too(conditional, tmp_path):
    backbone = copied(conditional, tmp_path / "backbone")
    report = fid(backbone, max_images=70)
    assert report.data["patch"]["patch_sha256"] is None
    assert report.data["value"] > 0


def test_the_batch_does_not_matter(run):
    one, other = (fid(run, max_images=80, sample_batch=batch).data["value"] for batch in (80, 7))
    assert one == pytest.approx(other, rel=1e-3)


def test_a_folder_and_an_npz_of_the_same_images_agree(real, tmp_path):
    colour = Digits(channels=3).images()[:200].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", arr_0=colour)
    folder = digit_folder(tmp_path / "grey", 200)
    of_npz = fid(tmp_path / "x.npz", reference="digits")
    of_folder = fid(folder, reference="digits")
    assert of_npz.data["protocol"]["shape"] == [3, 8, 8]
    assert of_npz.data["value"] == pytest.approx(3 * of_folder.data["value"], rel=1e-6)  # three equal channels
    assert fid(folder, reference="digits", max_images=150).data["n"] == 150


def test_names_carry_the_number():
    class Inception:
        name = "inception"

    assert metric_name(Inception(), 50_000) == "fid50k"
    assert metric_name(Inception(), 2_049) == "fid2049"
    assert metric_name(Pixels(1, 8), 5_000) == "fd-pixels-5k"


@pytest.mark.parametrize("count", [64, 10, 2])
def test_few_images_are_refused_or_allowed(run, count):
    with pytest.raises(UsageError, match=f"{count} images are too few for 64 features") as failure:
        fid(run, max_images=count)
    assert "--allow-small" in failure.value.hint
    report = fid(run, max_images=count, allow_small=True)
    assert (report.data["n"], report.data["standard_error"], report.data["debiased"]) == (count, None, None)
    assert f"warning: no standard error with {count} images for 64 features" in report.lines


def test_a_dry_run_measures_and_writes_nothing(run, finished):
    report = fid(run, max_images=80, dry_run=True)
    assert report.data["dry_run"] is True
    assert files(run) == files(finished)
    with pytest.raises(UsageError, match="too few"):
        fid(run, max_images=8, dry_run=True)


def test_nothing_to_compare_with(real):
    with pytest.raises(UsageError, match="nothing says what to compare"):
        fid(real)


def test_what_can_be_measured(tmp_path):
    with pytest.raises(MissingError, match=r"is no run, no folder of images and no \.npz file"):
        fid(tmp_path / "nowhere", reference="digits")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images in"):
        fid(tmp_path / "empty", reference="digits")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04" + bytes(50)])
def test_an_npz_that_is_none(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(IntegrityError, match="not a readable npz"):
        fid(tmp_path / "x.npz", reference="digits")


def test_inception_needs_its_weights(run, real, tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(MissingError, match="the Inception extractor needs its weights") as failure:
        fid(run, extractor="inception")
    assert "dmpctl download inception" in failure.value.hint
    with pytest.raises(MissingError, match=r"nowhere\.pth"):
        fid(run, extractor="inception", extractor_weights=str(tmp_path / "nowhere.pth"))


def test_other_networks_need_their_weights(real, tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(MissingError, match=r"dinov2 .* is not in the cache") as failure:
        fid(real, reference="digits", protocol="dinov2", allow_small=True)
    assert "dmpctl download dinov2" in failure.value.hint
    with pytest.raises(MissingError, match="timm:resnet18 needs its weights"):
        fid(real, reference="digits", extractor="timm:resnet18")


def test_the_extractor_follows_the_size():
    options, device = settings_for("fid").fid, torch.device("cpu")
    assert features.build_extractor(options, (1, 31, 31), device).name == "pixels"
    assert features.build_extractor(options.model_copy(update={"extractor": "pixels"}), (3, 64, 64), device).width == 3 * 64**2


def test_images_in_batches_are_all_the_images():
    source = Digits()
    assert torch.equal(torch.cat(list(images_of(source, batch=500))), source.images())
    assert [len(part) for part in images_of(source, 300)] == [256, 44]
    with pytest.raises(UsageError, match="there are no images"):
        features.extract(Pixels(1, 8), [])
