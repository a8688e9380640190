import json
import os
import signal
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dmpctl.errors import Interrupted, UsageError
from dmpctl.models.patch_files import load_patch, load_result
from dmpctl.rng import seed_of
from dmpctl.sampling import generate
from dmpctl.settings.measuring import Sampling
from dmpctl.types import Silent
from tests.helpers import copied, files, settings_for

CPU = torch.device("cpu")
FAST = {"sampler": "ddim", "steps": 3, "sample_batch": 5, "cpu": True}


def sample(run, **given):
    return generate.sample(settings_for("sample", **FAST | {"num_images": 7} | given), run, Silent())


@pytest.fixture
def run(finished, tmp_path):
    return copied(finished, tmp_path / "run")


@pytest.fixture
def backbone(conditional, tmp_path):
    return copied(conditional, tmp_path / "backbone")


class Cut(Silent):
    """Sends a signal when the first batch is done."""

    def __init__(self, number: int) -> None:
        self.number = number

    def advance(self, by: int = 1, **figures: float) -> None:
        os.kill(os.getpid(), self.number)


def test_labels():
    assert generate.labels_of([0, 1], 0, 0, None) is None
    assert generate.labels_of([4, 9], 0, 10, 3).tolist() == [3, 3]
    drawn = generate.labels_of(range(1000), 7, 10, None)
    assert drawn.dtype == torch.int64
    assert set(drawn.tolist()) == set(range(10))
    assert drawn[5] == seed_of(7, "label", 5) % 10
    assert generate.labels_of([5], 7, 10, None)[0] == drawn[5]
    assert not torch.equal(generate.labels_of(range(1000), 8, 10, None), drawn)
    with pytest.raises(UsageError, match="--label needs a class-conditional backbone"):
        generate.labels_of([0], 0, 0, 3)
    with pytest.raises(UsageError, match="out of range: this backbone has classes 0 to 9"):
        generate.labels_of([0], 0, 10, 10)


def test_a_folder_of_png(run):
    report = sample(run)
    folder = run / "samples" / "0000006-ddim-3-cfg1"
    names = {f"{k:06d}.png" for k in range(7)} | {"samples.json", "contact-sheet.png"}
    assert files(folder) == names
    assert report.data["out"] == str(folder)
    assert (report.data["images"], report.data["made"], report.data["kept"]) == (7, 7, 0)
    about = json.loads((folder / "samples.json").read_text())
    patch = json.loads((run / "patch.json").read_text())
    assert about["patch_sha256"] == patch["sha256"]
    assert about["backbone_sha256"] == patch["backbone"]["sha256"]
    assert (about["schema_version"], about["step"], about["sampling"]["steps"]) == (2, 6, 3)
    expected = generate.generate(load_patch(run), range(7), settings_for("sample", **FAST).sampling, CPU)
    for k, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(folder / f"{k:06d}.png")), image[0].numpy())


def test_what_is_there_is_kept_and_what_is_broken_is_made_again(run):
    sample(run)
    folder = run / "samples" / "0000006-ddim-3-cfg1"
    whole = {name: (folder / name).read_bytes() for name in files(folder)}
    (folder / "000002.png").unlink()
    (folder / "000004.png").write_bytes(whole["000004.png"][:-30])
    (folder / "000005.png").write_bytes(b"")
    Image.new("L", (8, 8)).save(folder / "000001.png")  # whole, but another
    (folder / "000006.png").write_bytes(whole["000003.png"])
    report = sample(run)
    assert (report.data["made"], report.data["kept"]) == (5, 2)
    for name, content in whole.items():
        assert (folder / name).read_bytes() == content
    assert (folder / "000001.png.damaged").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_folder_goes_on(run, tmp_path, number):
    settings = settings_for("sample", **FAST | {"num_images": 7})
    with pytest.raises(Interrupted, match="after 5 of 7 images") as failure:
        generate.sample(settings, run, Cut(number))
    assert failure.value.exit_code == 128 + number
    folder = run / "samples" / "0000006-ddim-3-cfg1"
    assert files(folder) == {f"{k:06d}.png" for k in range(5)} | {"samples.json"}
    assert sample(run).data["made"] == 2
    sample(run, out=tmp_path / "all", sample_batch=16)
    for name in files(folder) - {"samples.json"}:
        assert (folder / name).read_bytes() == (tmp_path / "all" / name).read_bytes()


def test_images_made_in_another_way_are_refused(run, tmp_path):
    out = tmp_path / "images"
    sample(run, out=out)
    before = files(out)
    for change in ({"steps": 4}, {"sample_seed": 1}, {"unpatched": True}):
        with pytest.raises(UsageError, match="holds images made with another"):
            sample(run, out=out, **change)
    assert files(out) == before
    assert sample(run, out=out, sample_batch=2, num_images=9).data["made"] == 2  # not another way, only more


def test_other_places_are_refused(run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="is not empty and holds no samples"):
        sample(run, out=tmp_path / "photos")
    with pytest.raises(UsageError, match="cannot write to"):
        sample(run, out=tmp_path / "photos" / "mine.png")


def test_what_cannot_be_sampled_writes_nothing(run):
    before = files(run)
    for given, sentence in (
        ({"image_label": 3}, "--label needs a class"),
        ({"cfg": 2.0}, "guidance 2 needs a backbone with classes"),
    ):
        with pytest.raises(UsageError, match=sentence):
            sample(run, **given)
    assert files(run) == before


def test_a_dry_run_writes_nothing(run):
    before = files(run)
    report = sample(run, dry_run=True)
    assert report.data["dry_run"] is True
    assert "would write 7 images" in report.lines[0]
    assert files(run) == before


def test_without_the_patch_it_is_the_backbone(run, tmp_path):
    sample(run)
    sample(run, unpatched=True)
    with_patch, without = (run / "samples" / name for name in ("0000006-ddim-3-cfg1", "0000000-ddim-3-cfg1-backbone"))
    assert files(with_patch) == files(without)
    assert any((with_patch / f"{k:06d}.png").read_bytes() != (without / f"{k:06d}.png").read_bytes() for k in range(7))
    assert json.loads((without / "samples.json").read_text())["patch_sha256"] is None


@pytest.mark.parametrize("count", [7, 1])
def test_npz_in_the_layout_of_adm(run, count):
    report = sample(run, image_format="npz", num_images=count)
    folder = run / "samples" / "0000006-ddim-3-cfg1"
    assert files(folder) == {f"{count}.npz", "samples.json"}
    assert report.data["made"] == count
    with np.load(folder / f"{count}.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        array = archive["arr_0"]
    assert (array.dtype, array.shape) == (np.uint8, (count, 8, 8, 3))
    expected = generate.generate(load_patch(run), range(count), settings_for("sample", **FAST).sampling, CPU)
    assert np.array_equal(array, expected.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    assert zipfile.ZipFile(folder / f"{count}.npz").testzip() is None


def test_an_interrupted_npz_leaves_the_old_one(run):
    sample(run, image_format="npz")
    path = run / "samples" / "0000006-ddim-3-cfg1" / "7.npz"
    before = path.read_bytes()
    with pytest.raises(Interrupted):
        generate.sample(settings_for("sample", **FAST | {"num_images": 7, "image_format": "npz"}), run, Cut(signal.SIGINT))
    assert path.read_bytes() == before
    assert files(path.parent) == {"7.npz", "samples.json"}


def test_class_conditional_images(backbone, tmp_path):
    model = load_result(backbone)
    sampling = settings_for("sample", **FAST).sampling
    mixed = generate.generate(model, range(4), sampling, CPU)
    labels = generate.labels_of(range(4), 0, 10, None)
    for k in range(4):
        assert torch.equal(generate.generate(model, [k], sampling, CPU, int(labels[k]))[0], mixed[k])
    guided = generate.generate(model, range(4), sampling.model_copy(update={"cfg": 3.0}), CPU)
    assert not torch.equal(guided, mixed)
    sample(backbone, out=tmp_path / "threes", image_label=3)
    assert json.loads((tmp_path / "threes" / "samples.json").read_text())["label"] == 3
    with pytest.raises(UsageError, match="made with another label"):
        sample(backbone, out=tmp_path / "threes", image_label=4)


@pytest.mark.parametrize("patched", [True, False])
def test_bf16_is_the_network_under_autocast_and_the_sampler_in_float32(finished, patched):
    """As the same patch is trained with --precision bf16; latents and what samplers compute stay as they are."""
    model = load_patch(finished)
    model = model if patched else model.unpatched()
    x, t = torch.randn(4, *model.backbone.spec.latent_shape), torch.tensor([3, 100, 500, 900])
    plain, found = model.predict(x, t, None), model.in_precision("bf16").predict(x, t, None)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.predict(x, t, None)
    assert found.dtype == plain.dtype == torch.float32
    assert torch.equal(found, expected)
    assert 0 < (found - plain).abs().max() < 0.5
    seen = []

    def noted(x, t, cond):
        seen.append(x.dtype)
        return torch.zeros(len(x), 2 * x.shape[1], *x.shape[2:])

    images = generate.generate(model, [0, 1], Sampling(steps=3, sample_precision="bf16"), CPU)
    assert not torch.equal(images, generate.generate(model, [0, 1], Sampling(steps=3), CPU))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.backbone.model, "denoise", lambda x, t, cond, *edit: noted(x, t, cond))
        generate.generate(model, [0, 1], Sampling(steps=3, sample_precision="bf16"), CPU)
    assert seen == [torch.float32] * 3
