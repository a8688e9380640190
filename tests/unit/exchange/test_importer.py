"""Other people's checkpoints: what becomes of them, and what is refused. The golden weights stand for published ones."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dmpctl.backbones.dit import DiTConfig
from dmpctl.backbones.dit_weights import digest_of, dit_metadata
from dmpctl.errors import DmpError, IntegrityError, MissingError, UsageError
from dmpctl.exchange.importer import PATCH_KEYS, import_file
from dmpctl.files import read_json, read_tensors, write_tensors
from dmpctl.methods.dmp import DmpPatch
from dmpctl.methods.prompt_tuning import PromptPatch
from dmpctl.models.backbone import load_backbone
from dmpctl.models.patch_files import load_patch, load_result
from dmpctl.models.patched import Patched
from dmpctl.runs.records import CodecRecord
from dmpctl.settings.sections import Base
from dmpctl.types import ScheduleSpec, Silent
from tests.helpers import files, flip, settings_for, tree
from tests.unit.exchange.imported import CASES, GOLDEN, golden_state, imported, optimizer_state, published, saved, small

# ---- golden


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("config", [True, False])
def test_golden_tensors_pass_through_the_importer(tmp_path, name, config):
    """A .pt in the published layout, with optimizer and config, gives the published code's outputs."""
    state, about = golden_state(name)
    checkpoint: dict[str, Any] = {"model": state, "opt": optimizer_state(state)}
    given = {}
    if config:
        checkpoint["config"] = published(about)
    else:
        given = {"import_heads": 4} | ({"import_topk": 8} if about["topk"] < 1 else {})
    report = imported(saved(tmp_path / "0050000.pt", checkpoint), tmp_path / "run", **given)
    tensors, _ = read_tensors(GOLDEN / f"{name}.tensors.safetensors")
    model, x, t = load_result(tmp_path / "run"), tensors["x"], tensors["t"]
    y = tensors["y"] if about["num_classes"] > 1 else None
    assert (model.predict(x, t, y) - tensors["dmp_out"]).abs().max() < 1e-5
    assert (model.unpatched().predict(x, t, y) - tensors["base_out"]).abs().max() < 1e-5
    assert (tensors["dmp_out"] - tensors["base_out"]).abs().max() > 1e-2  # so the two cannot be confused
    assert model.step == 50_000
    assert isinstance(model.patch, DmpPatch)
    assert (model.patch.route(model.backbone.model.embed(t, y)).gates - tensors["gates"]).abs().max() < 1e-5
    assert report.data["taken"] == "its 'model' entry"


def test_nothing_is_lost_or_added(tmp_path):
    """Every tensor of the file is in the backbone or in the patch, bit for bit; and the run is no larger than that."""
    state, about = golden_state("class-topk")
    imported(saved(tmp_path / "a.pt", {"model": state, "config": published(about)}), tmp_path / "run")
    backbone, patch = (read_tensors(tmp_path / "run" / f"{name}.safetensors")[0] for name in ("backbone", "patch"))
    assert set(patch) == set(PATCH_KEYS)
    assert backbone.keys() | patch.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in {**backbone, **patch}.items())
    expected = {"backbone.safetensors", "patch.safetensors", "patch.json", "config.json", "provenance.json", ".lock"}
    assert files(tmp_path / "run") == expected


def test_the_patch_names_its_backbone_by_path_and_digest(tmp_path):
    state, about = golden_state("uncond-soft")
    imported(saved(tmp_path / "a.pt", {"model": state, "config": published(about)}), tmp_path / "run")
    recorded = read_json(tmp_path / "run" / "patch.json")
    rest = {name: value for name, value in state.items() if name not in PATCH_KEYS}
    assert recorded["backbone"]["base"] == str(tmp_path / "run" / "backbone.safetensors")
    assert recorded["backbone"]["sha256"] == digest_of(rest)
    assert recorded["data"] == {"name": None, "fingerprint": None}
    flip(tmp_path / "run" / "backbone.safetensors")
    with pytest.raises(IntegrityError, match=r"backbone\.safetensors is damaged"):
        load_result(tmp_path / "run")


# ---- what the file does not say


def test_what_is_assumed_is_said(tmp_path):
    state, _ = golden_state("uncond-soft")
    report = imported(saved(tmp_path / "a.pt", state), tmp_path / "run", import_heads=4)
    assert len(report.data["assumed"]) == 3
    for option in ("--schedule", "--position", "--topk"):
        assert any(option in sentence for sentence in report.data["assumed"])
        assert any(option in line for line in report.lines)
    given = {"import_schedule": "linear", "import_position": "add", "import_topk": 16}
    assert imported(tmp_path / "a.pt", tmp_path / "b", import_heads=4, **given).data["assumed"] == []


def test_options_go_before_the_config(tmp_path):
    state, about = golden_state("uncond-soft")
    path = saved(tmp_path / "a.pt", {"model": state, "config": published(about)})
    given = {"import_topk": 3, "import_position": "prepend", "import_schedule": "linear", "import_heads": 8, "data": "digits"}
    report = imported(path, tmp_path / "run", **given)
    method = report.data["method"]
    assert (method["gate"], method["topk"], method["position"]) == ("topk", 3, "prepend")
    assert (report.data["schedule"]["kind"], report.data["config"]["num_heads"]) == ("linear", 8)
    assert load_result(tmp_path / "run").record.data.name == load_result(tmp_path / "run").backbone.data == "digits"


@pytest.mark.parametrize(("topk", "kept"), [(1.0, None), (1, None), (0.5, 8), (0.49, 7), (16, None), (5, 5)])
def test_k_is_the_share_of_the_prompts_rounded_down_or_a_count(tmp_path, topk, kept):
    """As the published code: int(share * N)."""
    state, about = golden_state("uncond-soft")
    path = saved(tmp_path / "a.pt", {"model": state, "args": Namespace(topk=topk, num_heads=4)})
    assert imported(path, tmp_path / "run").data["method"]["topk"] == kept
    assert about["num_prompts"] == 16


@pytest.mark.parametrize("topk", [0.0, 0.01, -1.0, 17, float("nan")])
def test_a_share_that_keeps_nothing_or_too_much_is_refused(tmp_path, topk):
    state, _ = golden_state("uncond-soft")
    path = saved(tmp_path / "a.pt", {"model": state, "args": Namespace(topk=topk, num_heads=4)})
    with pytest.raises(UsageError, match="cannot keep"):
        imported(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fewer_prompts_than_tokens_are_prepended(tmp_path):
    state, _ = golden_state("uncond-soft")
    few = {"prompt_embeddings": state["prompt_embeddings"][:, :5], "gate.weight": state["gate.weight"][:5]}
    few |= {"gate.bias": state["gate.bias"][:5], "w_noise": state["w_noise"][:, :5]}
    path = saved(tmp_path / "a.pt", {name: value.clone() for name, value in (state | few).items()})
    assert imported(path, tmp_path / "run", import_heads=4).data["method"]["position"] == "prepend"
    with pytest.raises(UsageError, match="one prompt per token: 16 here, --prompts says 5"):
        imported(path, tmp_path / "b", import_heads=4, import_position="add")


def test_prompts_without_a_gate_are_prompt_tuning(tmp_path):
    state, _ = golden_state("uncond-soft")
    bare = {name: value for name, value in state.items() if name not in PATCH_KEYS[1:]}
    report = imported(saved(tmp_path / "a.pt", {"model": bare}), tmp_path / "run", import_heads=4)
    model = load_result(tmp_path / "run")
    assert report.data["method"]["method"] == "prompt"
    assert isinstance(model.patch, PromptPatch)
    assert torch.equal(model.patch.prompt_embeddings, state["prompt_embeddings"])
    with pytest.raises(UsageError, match="--topk says nothing"):
        imported(tmp_path / "a.pt", tmp_path / "b", import_heads=4, import_topk=2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("w_noise"), "lacks w_noise"),
        (lambda s: s.pop("prompt_embeddings"), "a gate without prompts"),
        (lambda s: s.update(prompt_embeddings=torch.zeros(16, 64)), "a gate without prompts"),
        (lambda s: s.update(prompt_embeddings=torch.zeros(4, 16, 64)), "prompts for 4 blocks, its backbone has 3"),
        (lambda s: s.update(prompt_embeddings=torch.zeros(3, 16, 32)), r"prompt_embeddings has shape \[3, 16, 32\]"),
        (lambda s: s.update({"gate.bias": torch.zeros(3)}), r"gate\.bias has shape \[3\], expected \[16\]"),
        (lambda s: s.update(extra=torch.zeros(1)), r"extra is unexpected \(1 in all\)"),
        (lambda s: s.pop("blocks.1.attn.qkv.weight"), r"blocks\.1\.attn\.qkv\.weight is missing"),
        (lambda s: s.pop("pos_embed"), "no DiT in the published layout"),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path, change, sentence):
    state, _ = golden_state("uncond-soft")
    change(state)
    with pytest.raises(IntegrityError, match=sentence):
        imported(saved(tmp_path / "a.pt", {"model": state}), tmp_path / "run", import_heads=4)
    assert not (tmp_path / "run").exists()


# ---- a backbone alone


CONFIG = DiTConfig(8, 4, 2, 384, 1, 6, 10)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("which", [None, "ema", "raw"])
def test_the_original_checkpoint_becomes_a_backbone(tmp_path, prefix, which):
    average, last = small(1, CONFIG), small(2, CONFIG)
    value = {key: {prefix + n: v for n, v in state.items()} for key, state in (("model", last), ("ema", average))}
    path = saved(tmp_path / "a.pt", value | {"opt": optimizer_state(last), "args": Namespace(model="DiT-S/2")})
    report = imported(path, tmp_path / "run", import_weights=which)
    expected, entry = (last, "model") if which == "raw" else (average, "ema")
    assert report.data["taken"] == f"its '{entry}' entry"
    assert any(f"its '{entry}' entry" in line for line in report.lines)
    assert files(tmp_path / "run") == {"backbone.safetensors", "backbone.json", "config.json", "provenance.json", ".lock"}
    loaded = load_backbone(Base(base=str(tmp_path / "run")))
    assert loaded.digest == report.data["backbone_sha256"] == digest_of(expected)
    assert loaded.model.config == CONFIG
    assert load_result(tmp_path / "run").patch is None
    assert read_json(tmp_path / "run" / "backbone.json")["weights"] == ("raw" if which == "raw" else "ema")


def test_a_bare_state_dict_and_plain_safetensors(tmp_path):
    state = small(0, CONFIG)
    save_file(state, tmp_path / "b.safetensors")
    for path in (saved(tmp_path / "a.pt", state), tmp_path / "b.safetensors"):
        report = imported(path, tmp_path / path.stem, shape=None)
        assert (report.data["taken"], report.data["backbone_sha256"]) == ("the file", digest_of(state))


def test_weights_that_the_file_does_not_hold(tmp_path):
    state = small(0, CONFIG)
    saved(tmp_path / "average.pt", {"ema": state})
    saved(tmp_path / "bare.pt", state)
    save_file(state, tmp_path / "bare.safetensors")
    for name, which in (("average.pt", "raw"), ("bare.pt", "ema"), ("bare.safetensors", "ema")):
        with pytest.raises(UsageError, match="holds no"):
            imported(tmp_path / name, tmp_path / "run", import_weights=which)
    assert imported(tmp_path / "bare.pt", tmp_path / "run", import_weights="raw").data["taken"] == "the file"


def test_our_own_backbone_keeps_what_it_says(tmp_path):
    config = DiTConfig(4, 1, 2, 8, 2, 2, 3, null_class=False)
    state = small(0, config)
    codec = CodecRecord(name="vae-ema", fingerprint="0" * 64, scale=0.18215)
    write_tensors(tmp_path / "a.safetensors", state, dit_metadata(config, ScheduleSpec("cosine", 400), "digits", codec))
    imported(tmp_path / "a.safetensors", tmp_path / "run")
    model = load_result(tmp_path / "run").backbone
    assert (model.model.config, model.spec.schedule, model.data) == (config, ScheduleSpec("cosine", 400), "digits")
    assert model.codec == codec
    with pytest.raises(UsageError, match="its schedule is cosine"):
        imported(tmp_path / "a.safetensors", tmp_path / "b", import_schedule="linear")


def test_the_named_shape_is_checked(tmp_path):
    path = saved(tmp_path / "a.pt", small(0, CONFIG))
    with pytest.raises(UsageError, match="no DiT-S/2: its depth is 1, not 12"):
        imported(path, tmp_path / "run", shape="DiT-S/2")
    with pytest.raises(UsageError, match="DiT-Q/2 is no published shape"):
        imported(path, tmp_path / "run", shape="DiT-Q/2")
    with pytest.raises(UsageError, match="--topk says nothing"):
        imported(path, tmp_path / "run", import_topk=2)


def test_heads_that_nothing_says(tmp_path):
    state, _ = golden_state("uncond-soft")
    with pytest.raises(UsageError, match="width 64") as caught:
        imported(saved(tmp_path / "a.pt", state), tmp_path / "run")
    assert "--num-heads" in str(caught.value.hint)


# ---- the run


def test_the_same_import_again_changes_nothing(tmp_path):
    state, about = golden_state("uncond-soft")
    path = saved(tmp_path / "a.pt", {"model": state, "config": published(about)})
    imported(path, tmp_path / "run")
    before = {name: digest for name, digest in tree(tmp_path / "run").items() if name != ".lock"}
    report = imported(path, tmp_path / "run")
    assert {name: digest for name, digest in tree(tmp_path / "run").items() if name != ".lock"} == before
    assert any("complete already" in line for line in report.lines)


def test_an_import_that_was_interrupted_is_completed(tmp_path):
    state, about = golden_state("uncond-soft")
    path = saved(tmp_path / "a.pt", {"model": state, "config": published(about)})
    imported(path, tmp_path / "run")
    before = tree(tmp_path / "run")
    for name in ("patch.json", "patch.safetensors"):
        (tmp_path / "run" / name).unlink()
    imported(path, tmp_path / "run")
    assert {n: d for n, d in tree(tmp_path / "run").items() if n != ".lock"} == {n: d for n, d in before.items() if n != ".lock"}


def test_a_run_that_holds_something_else_is_refused(tmp_path, finished):
    state, about = golden_state("uncond-soft")
    path = saved(tmp_path / "a.pt", {"model": state, "config": published(about)})
    imported(path, tmp_path / "run")
    with pytest.raises(UsageError, match=r"already uses different settings \(topk: None there, 3 now"):
        imported(path, tmp_path / "run", import_topk=3)
    other = saved(tmp_path / "b.pt", {"model": state | {"gate.bias": state["gate.bias"] + 1}, "config": published(about)})
    with pytest.raises(UsageError, match=r"already uses different settings \(file_sha256"):
        imported(other, tmp_path / "run")
    run = Path(shutil.copytree(finished, tmp_path / "finished"))
    with pytest.raises(UsageError, match="was made by dmpctl patch, not import"):
        imported(path, run)
    flip(tmp_path / "run" / "patch.safetensors")
    with pytest.raises(UsageError, match=r"patch\.safetensors is there already and holds something else"):
        imported(path, tmp_path / "run")


def test_a_dry_run_writes_nothing(tmp_path):
    state, about = golden_state("uncond-soft")
    path = saved(tmp_path / "a.pt", {"model": state, "config": published(about)})
    report = imported(path, tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()
    assert report.data["added_parameters"] > 0
    assert report.lines[-2] == "dry run: nothing was written"


def test_the_default_run_is_named_after_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, about = golden_state("uncond-soft")
    report = import_file(settings_for("import"), saved(tmp_path / "a.pt", {"model": state, "config": published(about)}), Silent())
    assert report.data["run"] == str(tmp_path / "runs" / "a")
    assert load_patch(tmp_path / "runs" / "a").patch is not None


@pytest.mark.parametrize(
    ("name", "kind"), [("no.pt", MissingError), ("no.safetensors", MissingError), ("bad.pt", IntegrityError)]
)
def test_what_is_not_there_or_damaged(tmp_path, name, kind):
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(kind):
        imported(tmp_path / name, tmp_path / "run")


def test_prompts_of_an_imported_patch_are_frozen(tmp_path):
    state, about = golden_state("uncond-soft")
    imported(saved(tmp_path / "a.pt", {"model": state, "config": published(about)}), tmp_path / "run")
    model: Patched = load_result(tmp_path / "run")
    assert model.patch is not None
    assert not any(p.requires_grad for module in (model.patch, model.backbone.model) for p in module.parameters())
    with pytest.raises(DmpError):
        load_result(tmp_path / "run", "ema")
