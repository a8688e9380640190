import json

import pytest
import torch

from dmpctl.errors import IntegrityError, MissingError
from dmpctl.files import read_json, read_tensors, sha256_of, write_json, write_tensors
from dmpctl.models.backbone import load_backbone
from dmpctl.models.patch_files import backbone_digest, lasting_name, load_patch, load_result
from dmpctl.settings.sections import Base
from tests.helpers import BUNDLED, copied, flip, write_by_hand

T = torch.tensor([10, 500, 990])


def noised(spec):
    return torch.randn(len(T), *spec.latent_shape, generator=torch.Generator().manual_seed(0))


def test_the_patch_is_applied(finished):
    """After training, the output differs from the backbone's, and without the patch it does not."""
    model = load_patch(finished)
    x = noised(model.backbone.spec)
    plain = model.backbone.model.denoise(x, T, None)
    assert (model.predict(x, T, None) - plain).abs().max() > 1e-4
    assert torch.equal(model.unpatched().predict(x, T, None), plain)
    assert (model.step, model.unpatched().step) == (6, 0)


def test_a_loaded_patch_is_what_was_saved(finished):
    model = load_patch(finished)
    tensors, _ = read_tensors(finished / "patch.safetensors")
    assert model.patch is not None
    assert set(model.patch.state_dict()) == set(tensors)
    assert all(torch.equal(model.patch.state_dict()[name], value) for name, value in tensors.items())
    assert not any(p.requires_grad for p in model.patch.parameters())
    assert backbone_digest(model.backbone) == model.backbone.digest == model.record.backbone.sha256


def test_a_checkpoint_is_a_patch_too(finished):
    assert load_patch(finished / "checkpoints" / "step-0000003").step == 3


def test_the_result_of_either_command(finished, conditional):
    assert load_result(finished).patch is not None
    backbone = load_result(conditional)
    assert backbone.patch is None
    assert backbone.backbone.spec.num_classes == 10


def test_what_is_no_patch(tmp_path, finished):
    with pytest.raises(MissingError, match="there is no run"):
        load_patch(tmp_path / "nowhere")
    with pytest.raises(MissingError, match=r"holds no finished patch \(patch.json\)"):
        load_patch(tmp_path)
    run = copied(finished, tmp_path / "run")
    (run / "patch.safetensors").unlink()
    with pytest.raises(MissingError, match=r"has no patch\.safetensors"):
        load_patch(run)


def test_a_flipped_bit(tmp_path, finished):
    run = copied(finished, tmp_path / "run")
    flip(run / "patch.safetensors")
    with pytest.raises(IntegrityError, match=r"patch\.safetensors is damaged: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        load_patch(run)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("w_noise"), "lacks w_noise"),
        (lambda t: t.update(extra=torch.zeros(1)), "has unexpected extra"),
        (lambda t: t.update({"gate.bias": torch.zeros(3)}), r"gate\.bias has shape \[3\], expected \[16\]"),
    ],
)
def test_keys_and_shapes_fit_exactly(tmp_path, finished, change, sentence):
    """Whoever writes another file with a right hash is still refused."""
    run = copied(finished, tmp_path / "run")
    tensors, _ = read_tensors(run / "patch.safetensors")
    change(tensors)
    digest = write_tensors(run / "patch.safetensors", tensors)
    write_json(run / "patch.json", read_json(run / "patch.json") | {"sha256": digest})
    with pytest.raises(IntegrityError, match=sentence):
        load_patch(run)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("backbone", "latent_shape"), [1, 16, 16], r"latent shape \[1, 16, 16\], this one has \[1, 8, 8\]"),
        (("backbone", "sites"), 12, "sites 12, this one has "),
        (("backbone", "schedule"), {"kind": "cosine", "steps": 1000}, "schedule .*cosine.*this one has .*linear"),
        (("backbone", "sha256"), "0" * 64, "another backbone: sha256 0000000000000000, this one is [0-9a-f]{16}"),
        (("schema_version",), 2, "schema_version 2"),
        (("method", "gate"), "unknown", "does not fit this dmpctl: gate"),
        (("method",), 5, "does not fit this dmpctl"),
        (("method", "method"), "lora", "does not fit this dmpctl: prompts"),
        (("backbone",), {}, "lacks base, weights, .* of its backbone"),
        (("data",), [], "lacks name of its data"),
    ],
)
def test_a_patch_refuses_what_it_was_not_trained_on(tmp_path, finished, path, value, sentence):
    run = copied(finished, tmp_path / "run")
    about = json.loads((run / "patch.json").read_text())
    place = about
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    write_by_hand(run / "patch.json", about)
    with pytest.raises(IntegrityError, match=sentence):
        load_patch(run)


@pytest.mark.parametrize("key", ["method", "backbone", "data", "sha256", "step"])
def test_a_patch_says_all_that_is_needed(tmp_path, finished, key):
    run = copied(finished, tmp_path / "run")
    about = json.loads((run / "patch.json").read_text())
    del about[key]
    write_by_hand(run / "patch.json", about)
    with pytest.raises(IntegrityError, match=f"patch.json lacks {key}"):
        load_patch(run)


def test_another_backbone_may_be_named_and_is_refused(finished, conditional):
    assert load_patch(finished, Base()).backbone.digest == load_backbone(Base()).digest
    with pytest.raises(IntegrityError, match=f"was trained on a backbone with sites {BUNDLED.depth}, this one has 2"):
        load_patch(finished, Base(base=str(conditional)))


def test_names_mean_the_same_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lasting_name("photos") == str(tmp_path / "photos")
    assert lasting_name("digits") == "digits"  # the bundled one, though a folder of that name lies here
    assert lasting_name("DiT-L/2") == "DiT-L/2"
    assert lasting_name("elsewhere") == "elsewhere"


def test_patch_json_is_small_and_complete(finished):
    about = read_json(finished / "patch.json", 1)
    assert about["sha256"] == sha256_of(finished / "patch.safetensors")
    sites, width = BUNDLED.depth, BUNDLED.hidden_size
    assert about["added_parameters"] == sites * 16 * width + (width + 1) * 16 + 16
    assert (about["weights"], about["step"], about["data"]["name"]) == ("raw", 6, "digits")
    assert about["method"]["prompt_lr"] == 0.05
