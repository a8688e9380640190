import json

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from dmpctl.data.bundled import Digits
from dmpctl.engine import evaluate
from dmpctl.engine.generate import generate
from dmpctl.engine.patched import load_patch
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.metrics.features.pixels import Pixels
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
    report = fid(run, max_images=90)
    images = generate(load_patch(run), range(90), settings_for("fid", **FAST).sampling, torch.device("cpu"))
    extractor = Pixels(1, 8)
    expected = published_formula(extractor(images), extractor(Digits().images()))
    assert report.data["value"] == pytest.approx(expected, rel=1e-4)
    assert report.data["metric"] == "fd-pixels-90"
    assert report.data["standard_error"] > 0
    assert report.data["debiased"] < report.data["value"]


def test_what_a_run_records(run, finished):
    report = fid(run, max_images=80)
    name = "metrics/fd-pixels-80-0000006-ddim-3-cfg1-seed0.json"
    assert files(run) - files(finished) == {name}
    found = json.loads((run / name).read_text())
    assert found == json.loads(json.dumps(report.data))
    assert {
        "metric",
        "value",
        "standard_error",
        "n",
        "n_reference",
        "extractor",
        "reference",
        "sampling",
        "patch",
        "versions",
    } < set(found)
    assert found["patch"]["patch_sha256"] == json.loads((run / "patch.json").read_text())["sha256"]
    assert found["sampling"]["steps"] == 3
    assert found["reference"]["name"] == "digits"  # the run's own data


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
    assert of_npz.data["images"]["shape"] == [3, 8, 8]
    assert of_npz.data["value"] == pytest.approx(3 * of_folder.data["value"], rel=1e-6)  # three equal channels
    assert fid(folder, reference="digits", max_images=150).data["n"] == 150


def test_names_carry_the_number():
    class Inception:
        name = "inception"

    assert evaluate.metric_name(Inception(), 50_000) == "fid50k"
    assert evaluate.metric_name(Inception(), 2_049) == "fid2049"
    assert evaluate.metric_name(Pixels(1, 8), 5_000) == "fd-pixels-5k"


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


def saved(path, **arrays):
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda p: p.write_bytes(b""), "holds no arr_0 of images"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + b"\0" * 50), "holds no arr_0 of images"),
        (lambda p: p.write_bytes(b"\x80\x04not a pickle"), "holds no arr_0 of images"),
        (lambda p: np.save(p.open("wb"), np.zeros(3)), "holds no arr_0 of images"),
        (lambda p: saved(p, other=np.zeros((2, 8, 8, 3), np.uint8)), "holds no arr_0 of images"),
        (lambda p: saved(p, arr_0=np.array([print], dtype=object)), "holds no arr_0 of images"),
        (lambda p: saved(p, arr_0=np.zeros((2, 8, 8, 3))), r"should be uint8 \[N, H, W, 3\], found float64"),
        (lambda p: saved(p, arr_0=np.zeros((2, 3, 8, 8), np.uint8)), r"found uint8 \[2, 3, 8, 8\]"),
    ],
)
def test_an_npz_that_is_none(tmp_path, write, sentence):
    write(tmp_path / "x.npz")
    with pytest.raises(IntegrityError, match=sentence):
        fid(tmp_path / "x.npz", reference="digits")


def test_a_compressed_npz_that_is_damaged(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, arr_0=np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match="holds no arr_0"):
            fid(path, reference="digits")
    path.write_bytes(whole[:200] + bytes(100) + whole[300:])
    with pytest.raises(IntegrityError, match="holds no arr_0"):
        fid(path, reference="digits")


def test_inception_needs_its_weights(run, real, tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(MissingError, match="the Inception extractor needs its weights") as failure:
        fid(run, extractor="inception")
    assert "dmpctl download inception" in failure.value.hint
    with pytest.raises(MissingError, match=r"nowhere\.pth"):
        fid(run, extractor="inception", extractor_weights=str(tmp_path / "nowhere.pth"))


def test_the_extractor_follows_the_size():
    options, device = settings_for("fid").fid, torch.device("cpu")
    assert evaluate.build_extractor(options, (1, 31, 31), device).name == "pixels"
    assert evaluate.build_extractor(options.model_copy(update={"extractor": "pixels"}), (3, 64, 64), device).width == 3 * 64**2


def test_images_in_batches_are_all_the_images():
    source = Digits()
    assert torch.equal(torch.cat(list(evaluate.images_of(source, batch=500))), source.images())
    assert [len(part) for part in evaluate.images_of(source, 300)] == [256, 44]
    assert [len(part) for part in evaluate.in_parts(source.images(), 1000)] == [1000, 797]
    with pytest.raises(UsageError, match="there are no images"):
        evaluate.extract(Pixels(1, 8), [])
