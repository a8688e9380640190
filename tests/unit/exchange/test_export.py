"""What `dmpctl export` writes: the same numbers in another form, and nothing that the form cannot hold."""

import json
import os
from pathlib import Path

import pytest
import torch

from dmpctl.backbones.dit_weights import digest_of, read_weights
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.exchange.export import export
from dmpctl.exchange.importer import import_file
from dmpctl.files import read_json, read_tensors, write_json, write_tensors
from dmpctl.models.backbone import load_backbone
from dmpctl.models.patch_files import load_merged, load_patch, load_result, outputs_of
from dmpctl.models.patched import Patched
from dmpctl.settings.sections import Base
from dmpctl.types import Report, Silent
from tests.helpers import copied, files, flip, patch_run, settings_for, tree

T = torch.tensor([3, 400, 990])


def exported(run: Path, to: str, **given: object) -> Report:
    return export(settings_for("export", to=to, **given), run, Silent())


def imported(path: Path, run: Path) -> Path:
    import_file(settings_for("import", import_run=run), path, Silent())
    return run


def predicted(model: Patched) -> torch.Tensor:
    x = torch.randn(len(T), *model.backbone.spec.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.predict(x, T, None)


def same_state(a: Patched, b: Patched) -> bool:
    """Backbone and patch hold the same tensors, bit for bit."""
    assert a.patch is not None
    assert b.patch is not None
    one, two = a.patch.state_dict(), b.patch.state_dict()
    return (
        a.backbone.digest == b.backbone.digest == digest_of(b.backbone.model.state_dict())
        and one.keys() == two.keys()
        and all(torch.equal(one[name], two[name]) for name in one)
    )


METHODS = {
    "topk": {"gate": "topk", "topk": 3, "prompt_depth": 1},
    "prepend": {"position": "prepend", "prompts": 5},
    "prompt": {"method": "prompt"},
    "sets": {"prompt_sets": 2},
    "rank": {"prompt_rank": 2},
    "per-site": {"gate_per_site": True},
    "lora": {"method": "lora", "rank": 2, "lr": 0.01},
    "full": {"method": "full", "lr": 0.01},
}
RATES = {"prompt_lr": 0.05, "gate_lr": 0.05}


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of each method. Not to be written to."""
    path = tmp_path_factory.mktemp(request.param) / "run"
    given = METHODS[request.param]
    rates = {} if given.get("method") in ("lora", "full") else RATES
    rates = {"prompt_lr": 0.05} if given.get("method") == "prompt" else rates
    patch_run(path, iters=3, save_every=3, ema=0.0, **rates, **given)
    return path


# ---- patch


def test_a_patch_alone_is_two_files_that_still_are_the_patch(tmp_path, run):
    report = exported(run, "patch", out=tmp_path / "alone")
    assert files(tmp_path / "alone") == {"patch.safetensors", "patch.json"}
    assert (tmp_path / "alone" / "patch.safetensors").read_bytes() == (run / "patch.safetensors").read_bytes()
    assert read_json(tmp_path / "alone" / "patch.json") == read_json(run / "patch.json")
    assert torch.equal(predicted(load_result(tmp_path / "alone")), predicted(load_result(run)))
    assert report.data["files"]["patch.safetensors"]["sha256"] == read_json(run / "patch.json")["sha256"]


# ---- merged


def test_merged_gives_the_same_predictions_from_one_file(tmp_path, run):
    path = tmp_path / "m.safetensors"
    exported(run, "merged", out=path)
    assert files(tmp_path) == {"m.safetensors"}
    before, after = load_result(run), load_result(path)
    assert (predicted(before) - predicted(before.unpatched())).abs().max() > 1e-4
    if read_json(run / "patch.json")["method"]["method"] in ("lora", "full"):
        assert after.patch is None
        assert (predicted(after) - predicted(before)).abs().max() < 1e-5
        assert load_backbone(Base(base=str(path))).model.config == before.backbone.model.config
        assert after.backbone.data == before.backbone.data
    else:
        assert same_state(before, after)
        assert torch.equal(predicted(after), predicted(before))
        assert (after.step, after.record) == (before.step, before.record)


def test_a_merged_file_comes_apart_again(tmp_path, run):
    exported(run, "merged", out=tmp_path / "m.safetensors")
    before, after = load_result(run), load_result(imported(tmp_path / "m.safetensors", tmp_path / "apart"))
    assert torch.equal(predicted(load_result(tmp_path / "m.safetensors")), predicted(after))
    if before.patch is not None and after.patch is not None:
        assert same_state(before, after)
        assert after.record.backbone.base == str(tmp_path / "apart" / "backbone.safetensors")
        kept = ("method", "step", "data", "weights", "sha256", "added_parameters")
        assert {key: getattr(after.record, key) for key in kept} == {key: getattr(before.record, key) for key in kept}


def test_a_merged_file_is_no_backbone_for_another_patch(tmp_path, finished):
    path = tmp_path / "m.safetensors"
    exported(finished, "merged", out=path)
    for use in (lambda: load_backbone(Base(base=str(path))), lambda: read_weights(path)):
        with pytest.raises(UsageError, match="a patch on it") as caught:
            use()
        assert "use the backbone alone" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["patch.gate.bias", "blocks.0.mlp.fc1.weight"])
def test_a_changed_tensor_of_a_merged_file_is_noticed(tmp_path, finished, name):
    path = tmp_path / "m.safetensors"
    exported(finished, "merged", out=path)
    tensors, metadata = read_tensors(path)
    tensors[name].view(-1)[0] += 1
    write_tensors(path, tensors, metadata)
    with pytest.raises(IntegrityError, match=r"m\.safetensors is damaged: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        load_result(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda about: about.pop("method"), "lacks method"),
        (lambda about: about.update(schema_version=2), "schema_version 2"),
        (lambda about: about.update(backbone=3), "lacks base, .* of its backbone"),
        (lambda about: about["method"].update(surprise=1), "does not fit this dmpctl"),
    ],
)
def test_a_description_that_is_none_is_refused(tmp_path, finished, change, sentence):
    path = tmp_path / "m.safetensors"
    exported(finished, "merged", out=path)
    tensors, metadata = read_tensors(path)
    about = json.loads(metadata["dmpctl.patch"])
    change(about)
    write_tensors(path, tensors, metadata | {"dmpctl.patch": json.dumps(about)})
    with pytest.raises(IntegrityError, match=sentence):
        load_merged(path)
    for text in ("", "[]", "3"):
        write_tensors(path, tensors, metadata | {"dmpctl.patch": text})
        with pytest.raises(IntegrityError):
            load_result(path)


def test_a_flipped_bit_of_a_merged_file_is_refused(tmp_path, finished):
    path = tmp_path / "m.safetensors"
    exported(finished, "merged", out=path)
    flip(path)
    with pytest.raises(IntegrityError):
        load_result(path)


# ---- the published layout


@pytest.mark.parametrize("name", ["topk", "prepend", "prompt", "soft"])
def test_the_published_layout_and_back_is_bit_exact(tmp_path, name):
    run = tmp_path / "run"
    rates = {"prompt_lr": 0.05} if name == "prompt" else RATES
    patch_run(run, iters=3, save_every=3, ema=0.0, **rates, **METHODS.get(name, {}))
    exported(run, "dmp-pt", out=tmp_path / "0000003.pt")
    before, after = load_result(run), load_result(imported(tmp_path / "0000003.pt", tmp_path / "back"))
    assert same_state(before, after)
    assert torch.equal(predicted(before), predicted(after))
    assert after.step == before.step == 3
    patched = torch.load(tmp_path / "0000003.pt", weights_only=True)["config"]["models"]["vp"]
    assert patched["pt_depth"] == before.patch.shape.sites
    one, two = (
        [getattr(model.record.method, key, None) for key in ("method", "position", "gate", "topk")] for model in (before, after)
    )
    assert one == two


def test_the_published_file_is_what_the_published_code_loads(tmp_path, finished):
    """Flat state dicts under model and ema, published names and shapes, no class but torch's own."""
    exported(finished, "dmp-pt", out=tmp_path / "a.pt")
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "a.pt") == []
    value = torch.load(tmp_path / "a.pt", weights_only=True)
    assert value.keys() == {"model", "ema", "config"}
    model = load_patch(finished)
    n, d, depth = (model.backbone.spec.sites[0].tokens, model.backbone.spec.sites[0].width, len(model.backbone.spec.sites))
    for state in (value["model"], value["ema"]):
        shapes = {name: list(state[name].shape) for name in ("prompt_embeddings", "gate.weight", "gate.bias", "w_noise")}
        expected = {"prompt_embeddings": [depth, n, d], "gate.weight": [n, d + 1], "gate.bias": [n], "w_noise": [d, n]}
        assert shapes == expected
        assert state.keys() - shapes.keys() == model.backbone.model.state_dict().keys()
    assert value["config"]["models"]["vp"] == {
        "num_tokens": n, "topk": 1.0, "type": "add", "uncond": True, "gate_type": "linear", "pt_depth": depth
    }  # fmt: skip
    assert value["config"]["general"] == {"schedule_name": "linear"}


@pytest.mark.parametrize("prompts", [3, 49, 107, 1024])
def test_every_k_comes_back_from_its_share(prompts):
    from dmpctl.exchange.export import _fraction

    assert all(int(_fraction(k, prompts) * prompts) == k for k in range(1, prompts + 1))


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"method": "lora", "rank": 2}, "--method lora"),
        ({"method": "full"}, "--method full"),
        ({"prompt_sets": 2}, "--prompt-sets 2"),
        ({"prompt_rank": 2}, "--prompt-rank 2"),
        ({"prompt_sites": "1"}, "--prompt-sites 1"),
        ({"method": "prompt", "prompt_sites": "1"}, "--prompt-sites 1"),
        ({"gate_per_site": True}, "--gate-per-site"),
        ({"gate": "uniform"}, "--gate uniform"),
        ({"gate": "random"}, "--gate random"),
        ({"gate": "hard"}, "--gate hard"),
        ({"gate_scale": 16.0}, "--gate-scale 16.0"),
        ({"gate_input": "t"}, "--gate-input t with --position add"),
        ({"gate_input": "t+y", "position": "prepend"}, r"--gate-input t\+y with --position prepend"),
    ],
)
def test_what_the_published_code_does_not_have_is_named(tmp_path, given, option):
    patch_run(tmp_path / "run", iters=1, save_every=1, ema=0.0, **given)
    with pytest.raises(UsageError, match=f"the published layout has no {option}") as caught:
        exported(tmp_path / "run", "dmp-pt")
    assert "--to merged" in str(caught.value.hint)
    assert not (tmp_path / "run" / "exports").exists()


def test_settings_that_say_the_default_are_published(tmp_path):
    patch_run(tmp_path / "run", iters=1, save_every=1, ema=0.0, gate_scale=1.0, gate_input="t+y", gate_noise=False)
    exported(tmp_path / "run", "dmp-pt", out=tmp_path / "a.pt")


# ---- where it goes


@pytest.mark.parametrize(
    ("to", "names"),
    [
        ("patch", {"exports/patch/patch.safetensors", "exports/patch/patch.json"}),
        ("merged", {"exports/merged.safetensors"}),
        ("dmp-pt", {"exports/0000006.pt"}),
    ],
)
def test_it_goes_into_the_run_and_once_only(tmp_path, finished, to, names):
    run = copied(finished, tmp_path / "run")
    before = files(run)
    first = exported(run, to)
    assert files(run) - before == names
    assert any("written" in line for line in first.lines)
    written = tree(run)
    again = exported(run, to)
    assert tree(run) == written
    assert any("was there already" in line for line in again.lines)
    flip(run / min(names))
    with pytest.raises(UsageError, match="is there already and holds something else"):
        exported(run, to)


def test_a_merged_file_can_be_exported_again(tmp_path, finished):
    exported(finished, "merged", out=tmp_path / "m.safetensors")
    exported(tmp_path / "m.safetensors", "patch")
    assert files(tmp_path) == {"m.safetensors", "m/exports/patch/patch.safetensors", "m/exports/patch/patch.json"}
    assert same_state(load_result(tmp_path / "m" / "exports" / "patch"), load_result(finished))


def test_outputs_of_a_file_lie_beside_it(tmp_path, finished):
    (tmp_path / "m.safetensors").touch()
    assert outputs_of(tmp_path / "m.safetensors") == tmp_path / "m"
    assert outputs_of(finished) == finished


def test_a_half_written_patch_is_completed(tmp_path, finished):
    exported(finished, "patch", out=tmp_path / "alone")
    (tmp_path / "alone" / "patch.json").unlink()
    exported(finished, "patch", out=tmp_path / "alone")
    assert load_result(tmp_path / "alone").patch is not None


def test_targets_of_the_wrong_kind(tmp_path, finished):
    for to, suffix in (("merged", ".safetensors"), ("dmp-pt", ".pt")):
        with pytest.raises(UsageError, match=f"should end with {suffix}"):
            exported(finished, to, out=tmp_path / "a.bin")
        (tmp_path / f"folder{suffix}").mkdir()
        with pytest.raises(UsageError, match="is a folder"):
            exported(finished, to, out=tmp_path / f"folder{suffix}")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write to"):
        exported(finished, "patch", out=tmp_path / "file")
    assert files(tmp_path) == {"file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_to(tmp_path, finished):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="cannot write to"):
        exported(finished, "merged", out=tmp_path / "locked" / "m.safetensors")


def test_a_dry_run_writes_nothing(tmp_path, finished):
    run = copied(finished, tmp_path / "run")
    before = tree(run)
    report = exported(run, "merged", dry_run=True)
    assert tree(run) == before
    assert report.data["files"]["merged.safetensors"]["bytes"] > 0


def test_a_backbone_has_no_patch_to_export(conditional):
    with pytest.raises(UsageError, match="a backbone without a patch"):
        exported(conditional, "merged")


# ---- which weights


def test_the_last_weights_of_a_run_with_an_average(tmp_path):
    run = tmp_path / "run"
    patch_run(run, ema=0.9, **RATES)
    for which in ("ema", "raw"):
        exported(run, "merged", out=tmp_path / f"{which}.safetensors", result_weights=which)
        after = load_result(tmp_path / f"{which}.safetensors")
        assert same_state(load_result(run, which), after)
        assert after.record.weights == which
        assert load_result(tmp_path / f"{which}.safetensors", which).patch is not None
    with pytest.raises(UsageError, match="holds no raw weights"):
        load_result(tmp_path / "ema.safetensors", "raw")
    exported(run, "patch", out=tmp_path / "alone", result_weights="raw")
    assert same_state(load_result(run, "raw"), load_result(tmp_path / "alone"))


def test_a_run_on_another_backbone_is_not_exported(tmp_path, finished):
    run = copied(finished, tmp_path / "run")
    about = read_json(run / "patch.json")
    write_json(run / "patch.json", about | {"backbone": about["backbone"] | {"sha256": "0" * 64}})
    with pytest.raises(IntegrityError, match="another backbone"):
        exported(run, "merged")
