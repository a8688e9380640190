"""Words of a file about itself are read once, for --base and import alike: each key used, harmless, or refused by name."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.told import Given, told
from dmpctl.codecs.text import TextEncoder
from dmpctl.errors import DmpError, IntegrityError, UsageError
from dmpctl.models.backbone import Loaded, load_backbone
from dmpctl.models.patch_files import load_result
from dmpctl.models.patched import Patched
from dmpctl.settings.sections import Base
from dmpctl.types import ScheduleSpec
from tests.faults.unsound import Bad, spoilt
from tests.foreign_helpers import tiny_t5
from tests.helpers import patch_run, run_cli, settings_for
from tests.unit.exchange.imported import imported, saved, small

WIDE = DiTConfig(8, 4, 2, 384, 1, 12, 10)  # of the width of DiT-S, which has 6 heads
SLIM = DiTConfig(8, 4, 2, 16, 2, 2, 10)
HEADS = {"num_heads": 2}
State = dict[str, Tensor]


def based(path: Path, tmp_path: Path) -> Loaded:
    return load_backbone(Base(base=str(path)))


def brought(path: Path, tmp_path: Path) -> Loaded:
    """Opens a file through `dmpctl import`."""
    imported(path, tmp_path / "run")
    return load_result(tmp_path / "run").backbone


ROADS = {"base": based, "import": brought}


@pytest.fixture(params=ROADS)
def opened(request, tmp_path) -> Callable[[Any], Loaded]:
    """Open a checkpoint with this content by --base, or by import."""

    def go(value: Any) -> Loaded:
        return ROADS[request.param](saved(tmp_path / "c.pt", value), tmp_path)

    return go


def predicted(loaded: Loaded, level: float = 0.3, label: int = 3) -> Tensor:
    """The prediction for a fixed x at this share of the way to noise."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.full((2,), 1000 * level)
    return loaded.model.denoise(x, t, torch.tensor([label, label]))


# ---- keys


def test_heads_and_schedule_of_the_files_own_words(opened):
    state = small(0, WIDE)
    loaded = opened({"ema": state, "args": Namespace(model="DiT-B/2", num_heads=12, noise_schedule="cosine", num_classes=10)})
    model = DiT(WIDE, ScheduleSpec("cosine"))
    model.load_state_dict(state)
    assert loaded.model.config == WIDE
    assert loaded.spec.schedule == ScheduleSpec("cosine")
    assert torch.equal(predicted(loaded), predicted(replace(loaded, model=model)))


@pytest.mark.parametrize("metadata", [True, False])
def test_safetensors_of_others_say_it_in_their_metadata(tmp_path, metadata):
    text = '{"num_heads": 2, "noise_schedule": "cosine", "num_classes": 10}'
    save_file(small(0, SLIM), tmp_path / "a.safetensors", {"format": "pt"} | ({"config": text} if metadata else {}))
    if metadata:
        assert based(tmp_path / "a.safetensors", tmp_path).spec.schedule.kind == "cosine"
    else:
        with pytest.raises(UsageError, match="number of heads is unknown"):
            based(tmp_path / "a.safetensors", tmp_path)


SIT = {"model": "SiT-S/2", "path_type": "Linear", "prediction": "velocity", "num_heads": 2, "num_classes": 10}
REPA = {"model": "SiT-S/2", "path_type": "linear", "prediction": "v", "enc_type": "dinov2-vit-b", "cfg_prob": 0.1, **HEADS}


def test_a_sit_is_a_flow_from_noise_to_images(opened):
    """Ma et al. 2024: x_t = t data + (1 - t) noise, velocity data - noise; the network sees t in [0, 1]."""
    state = small(0, SLIM)
    loaded = opened({"ema": state, "args": Namespace(**SIT)})
    assert (loaded.spec.schedule, loaded.spec.prediction) == (ScheduleSpec("flow"), "velocity")
    plain = DiT(SLIM)
    plain.load_state_dict(state)
    torch.testing.assert_close(predicted(loaded), predicted(replace(loaded, model=plain), 0.7 / 1000))


@pytest.mark.parametrize("words", [REPA, {"num_heads": 2}])
def test_a_repa_counts_time_from_images_to_noise_and_loses_its_projectors(opened, words):
    """Yu et al. 2025: x_t = (1 - t) data + t noise, velocity noise - data."""
    config = replace(SLIM, learned_sigma=False)
    state = small(0, config)
    more = {f"projectors.0.{n}.weight": torch.randn(4, 4) for n in (0, 2, 4)}
    loaded = opened({"ema": state | more, "args": Namespace(**words)})
    assert loaded.spec.schedule == ScheduleSpec("flow")
    plain = DiT(config)
    plain.load_state_dict(state)
    torch.testing.assert_close(predicted(loaded), -predicted(replace(loaded, model=plain), 0.3 / 1000))
    assert loaded.model.state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (SIT | {"path_type": "GVP"}, "GVP"),
        (SIT | {"path_type": "VP"}, "VP"),
        (SIT | {"prediction": "noise"}, "prediction noise"),
        (SIT | {"prediction": "score"}, "prediction score"),
        (REPA | {"path_type": "cosine"}, "path cosine"),
        (REPA | {"qk_norm": True}, "qk_norm = True"),
        (HEADS | {"predict_xstart": True}, "predict_xstart = True"),
        (HEADS | {"prediction_type": "v_prediction"}, "prediction v_prediction"),
        (HEADS | {"noise_schedule": "sigmoid"}, "sigmoid"),
        (HEADS | {"time_shift": 0.3}, "time_shift = 0.3"),
        (HEADS | {"use_rope": True}, "use_rope = True"),
        (HEADS | {"my_new_norm": "rms"}, "my_new_norm = rms"),
        (HEADS | {"beta_start": 1e-4, "beta_end": 0.03, "beta_schedule": "linear"}, "0.03"),
        (HEADS | {"depth": 3}, "depth = 3"),
        (HEADS | {"learn_sigma": False}, "learn_sigma = False"),
        (HEADS | {"num_classes": 1000}, "1000 classes"),
    ],
)
def test_a_word_that_means_another_model_is_refused_by_name(opened, words, named):
    with pytest.raises(DmpError, match="^[^\n]*" + named) as caught:
        opened({"ema": small(0, SLIM), "args": Namespace(**words)})
    assert caught.value.exit_code in (2, 4)


def test_what_is_harmless_is_silent_and_the_codec_is_used(opened):
    training = {"lr": 1e-4, "global_batch_size": 256, "results_dir": "r", "adam_beta1": 0.9, "max_grad_norm": 1.0, "log_every": 9}
    words = HEADS | {"num_classes": 10, "noise_schedule": "linear", "image_size": 64, "vae": "mse", "wandb": False} | training
    loaded = opened({"ema": small(0, SLIM), "args": Namespace(**words)})
    assert loaded.assumed == ()
    assert loaded.codec is not None
    assert loaded.codec.name == "vae-mse"


def test_what_is_assumed_is_said_once_and_recorded(tmp_path):
    path = saved(tmp_path / "c.pt", {"ema": small(0, replace(SLIM, channels=1)), "args": Namespace(num_heads=2, whimsy=3)})
    given = ("--iters", 1, "--batch-size", 4, "--no-evaluate", "--cpu", "--data", "digits", "--run", tmp_path / "run")
    done = run_cli("patch", "--base", path, *given, cwd=tmp_path)
    for sentence in ("a linear schedule was assumed", "10 classes and a null class were assumed", "its config says whimsy"):
        assert done.err.count(sentence) == 1, done.err
        assert sentence in (tmp_path / "run" / "provenance.json").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "rows", "expected"),
    [
        ({"class_dropout_prob": 0.0}, 10, (10, None)),
        ({"class_dropout_prob": 0, "num_classes": 10}, 10, (10, None)),
        ({"num_classes": 10}, 10, (10, None)),
        ({"num_classes": 10}, 11, (10, 10)),
        ({"class_dropout_prob": 0.1}, 11, (10, 10)),
        ({}, 11, (10, 10)),
    ],
)
def test_rows_of_the_label_table_are_classes_and_perhaps_a_null_class(opened, words, rows, expected):
    loaded = opened({"ema": small(0, replace(SLIM, num_classes=rows - 1)), "args": Namespace(**HEADS, **words)})
    assert (loaded.spec.num_classes, loaded.spec.null_class) == expected


def test_guidance_without_a_null_class_is_refused(tmp_path):
    from dmpctl.sampling.generate import denoiser_of

    path = saved(tmp_path / "c.pt", {"ema": small(0, replace(SLIM, num_classes=9)), "args": Namespace(**HEADS, num_classes=10)})
    sampling = settings_for("sample", cfg=2.0).sampling
    with pytest.raises(UsageError, match="no null class"):
        denoiser_of(Patched(based(path, tmp_path)), [0], sampling, torch.device("cpu"))


def test_a_shape_that_the_file_contradicts_is_refused(tmp_path):
    path = saved(tmp_path / "c.pt", {"ema": small(0, WIDE), "args": Namespace(num_heads=12)})
    with pytest.raises(UsageError, match="12 heads, DiT-S/2 has 6"):
        load_backbone(Base(base="DiT-S/2", weights=path))
    bare = saved(tmp_path / "d.pt", small(0, WIDE))
    with pytest.raises(UsageError, match="is no DiT-S/2: its depth is 1, not 12"):
        load_backbone(Base(base="DiT-S/2", weights=bare))


# ---- wrappers


def renamed(change: Callable[[str], str]) -> Callable[[State], Any]:
    return lambda state: {change(name): value for name, value in state.items()}


def inside_blocks(wrapper: str) -> Callable[[State], Any]:
    return renamed(lambda name: name.replace("blocks.0.", f"blocks.0.{wrapper}.", 1))


def averaged(state: State) -> Any:
    """Of torch itself."""
    model = DiT(SLIM)
    model.load_state_dict(state)
    return {"ema": AveragedModel(nn.Sequential()).state_dict() | AveragedModel(model).state_dict()}


OTHER = small(9, SLIM)
WRAPPED: dict[str, Callable[[State], Any]] = {
    "compiled block": lambda state: {"ema": inside_blocks("_orig_mod")(state), "model": OTHER},
    "compiled, checkpointed and sharded": inside_blocks("_fsdp_wrapped_module._orig_mod._checkpoint_wrapped_module"),
    "DDP": lambda state: {"model": renamed(lambda name: f"module.{name}")(state)},
    "AveragedModel": averaged,
    "ema_pytorch": lambda state: (
        renamed(lambda name: f"ema_model.{name}")(state)
        | renamed(lambda name: f"online_model.{name}")(OTHER)
        | {"initted": torch.tensor(True), "step": torch.tensor(3)}
    ),
    "ema_pytorch in an entry": lambda state: {"model": OTHER, "ema": renamed(lambda name: f"ema_model.{name}")(state)},
    "Lightning": lambda state: {
        "state_dict": renamed(lambda name: f"model.{name}")(state) | {"vae.decoder.weight": torch.ones(3)},
        "epoch": 3,
        "pytorch-lightning_version": "2.5",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    },
    "Lightning with an average": lambda state: {
        "state_dict": renamed(lambda name: f"net.{name}")(OTHER) | renamed(lambda name: f"ema.{name}")(state)
    },
    "DeepSpeed": lambda state: {
        "module": state,
        "ds_version": "0.17",
        "global_steps": 7,
        "param_shapes": [{"a": torch.Size([2])}],
    },
    "FSDP": lambda state: {"state_dict": renamed(lambda name: f"_fsdp_wrapped_module.{name}")(state)},
    "two deep": lambda state: {"checkpoint": {"model_ema": state, "model": OTHER}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_training_wraps_around_a_model_is_taken_off(tmp_path, kind):
    state = small(0, SLIM)
    value = WRAPPED[kind](state)
    path = saved(tmp_path / "c.pt", value | {"args": Namespace(**HEADS)})
    found = based(path, tmp_path).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"shadow_params": [torch.ones(2)], "decay": 0.99}, "shadow_params"),
        ({"model": {"_fsdp_wrapped_module._flat_param": torch.ones(9)}}, "_flat_param"),
        ({"state_dict": {"unet.down.weight": torch.ones(9)}}, "unet.down.weight"),
        ({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2)}, "layout of diffusers"),
        ({"a": OTHER, "b": {"x": OTHER}}, "several models"),
    ],
)
def test_what_cannot_be_taken_off_is_named(tmp_path, value, found):
    with pytest.raises(IntegrityError, match=found) as caught:
        based(saved(tmp_path / "c.pt", value), tmp_path)
    assert "patch" not in caught.value.message
    assert caught.value.hint


# ---- pickles


def numpy_one(path: Path) -> Path:
    """Rename numpy 2's module to that of numpy 1 in a pickle: what numpy 1 wrote."""
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    return path


@pytest.mark.parametrize("one", [True, False])
def test_numbers_of_numpy_beside_weights_are_read(tmp_path, one):
    words = {"num_heads": np.int64(2), "num_classes": np.int32(10), "lr": np.float64(1e-4), "noise_schedule": np.str_("cosine")}
    path = tmp_path / "c.pt"
    torch.save({"ema": small(0, SLIM), "args": words, "loss": np.float32(0.1)}, path, _use_new_zipfile_serialization=False)
    if one:
        numpy_one(path)
    assert based(path, tmp_path).model.config == SLIM


@pytest.mark.parametrize("one", [True, False])
def test_statistics_of_torch_fidelity_are_read_whichever_numpy_wrote_them(tmp_path, one):
    from dmpctl.metrics.statistics import read_statistics

    path = tmp_path / "stats.pt"
    torch.save({"mu": np.arange(3.0), "sigma": np.eye(3), "n": np.int64(7)}, path, _use_new_zipfile_serialization=False)
    if one:
        numpy_one(path)
    assert read_statistics(path).features.mean.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "content", [b"", b"ii", b"rubbish", b"\x80\x02}q\x00.", bytes(range(256)), b"PK\x03\x04" + bytes(30), None], ids=repr
)
@pytest.mark.parametrize("command", [("import",), ("patch", "--data", "digits", "--base")])
def test_a_refused_file_gets_our_own_sentence(tmp_path, monkeypatch, capsys, content, command):
    from dmpctl.cli.app import main

    path = tmp_path / "t.pt"
    torch.save({"ema": Bad()}, path) if content is None else path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert main((*command, str(path))) == 4
    said = capsys.readouterr().err
    assert "weights_only" not in said
    assert "Error" not in said
    assert ("holds more than tensors" if content is None else "is not a readable checkpoint") in said or "no state dict" in said


# ---- numbers


@pytest.mark.parametrize("how", ["nan", "inf", "int", "complex", "too large", "strides"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_numbers_that_no_layer_takes_are_refused_with_the_tensors_name(tmp_path, how, suffix):
    name, path = "blocks.1.mlp.fc2.weight", tmp_path / f"c.{suffix}"
    bad = spoilt(small(0, SLIM), name, how)
    if suffix == "pt":
        saved(path, {"ema": bad, "args": Namespace(**HEADS)})
    elif how == "strides":
        pytest.skip("safetensors cannot hold it")
    else:
        save_file(bad, path, {"config": '{"num_heads": 2}'})
    with pytest.raises(IntegrityError, match=name) as caught:
        based(path, tmp_path)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("how", ["nan", "int"])
def test_a_patch_with_such_numbers_is_refused_too(tmp_path, how):
    from dmpctl.files import read_json, read_tensors, write_json, write_tensors
    from dmpctl.models.patch_files import load_patch

    run = tmp_path / "run"
    patch_run(run, iters=1)
    digest = write_tensors(
        run / "patch.safetensors", spoilt(read_tensors(run / "patch.safetensors")[0], "prompt_embeddings", how)
    )
    write_json(run / "patch.json", read_json(run / "patch.json") | {"sha256": digest})
    with pytest.raises(IntegrityError, match="prompt_embeddings"):
        load_patch(run)


# ---- captions as the encoder's own pipeline prepares them

CAPTIONS = ["A Red Car", "  a red car ", "a red car", ""]


def test_t5_reads_captions_as_pixarts_own_pipeline_prepares_them(tmp_path):
    """Compared with diffusers, which cleans fully where bs4 and ftfy are installed, else makes lower case."""
    from diffusers import PixArtAlphaPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    folder, kind = tiny_t5(tmp_path / "t5"), PixArtAlphaPipeline
    texts = [*CAPTIONS, "A  Photo... OF &amp; <b>it</b>"]
    prepared = kind._text_preprocessing(object.__new__(kind), texts, clean_caption=True)
    words = AutoTokenizer.from_pretrained(folder / "tokenizer")
    read = words(prepared, padding="max_length", max_length=120, truncation=True, return_tensors="pt")
    model: Any = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    expected = model(read.input_ids, attention_mask=read.attention_mask).last_hidden_state
    states, mask = TextEncoder(folder, "t5")(texts)
    torch.testing.assert_close(states[mask], expected[mask], rtol=0, atol=1e-6)
    assert torch.equal(states[0], states[2])
    assert not torch.equal(TextEncoder(folder, "t5", cleaning="none")(texts)[0][0], states[0])


def test_how_captions_are_cleaned_is_part_of_the_encoders_record_and_of_its_cache(tmp_path):
    from dmpctl.models.conditions import encoder_record, open_encoder
    from dmpctl.runs.records import EncoderRecord

    folder = tiny_t5(tmp_path / "t5")
    ways = {how: TextEncoder(folder, str(folder), cleaning=how) for how in ("none", "lower")}
    assert ways["none"].revision != ways["lower"].revision  # which names the cache
    for how, encoder in ways.items():
        record = encoder_record(encoder)
        assert record is not None
        opened = open_encoder(settings_for("patch"), None, EncoderRecord.model_validate(record.to_json()))
        assert opened is not None
        assert (opened.cleaning, opened.revision) == (how, encoder.revision)
    before = {"name": str(folder), "fingerprint": ways["none"].revision, "tokens": 120}  # a record of an earlier version
    opened = open_encoder(settings_for("patch"), None, EncoderRecord.model_validate(before))
    assert opened is not None
    assert opened.cleaning == "none"
    named = open_encoder(settings_for("patch"), None, EncoderRecord(name=str(folder)))
    assert named is not None
    assert named.cleaning != "none"


@pytest.mark.parametrize("from_data", [True, False])
def test_the_direction_of_time_goes_along_with_a_published_layout(from_data):
    from dmpctl.exchange.export import _config
    from dmpctl.foreign.said import said_by
    from dmpctl.settings.methods import Dmp

    model = DiT(replace(SLIM, from_data=from_data), ScheduleSpec("flow"))
    found = told("it", model.state_dict(), said_by({"config": _config(model, Dmp())}), Given())
    assert (found.config, found.schedule, found.assumed) == (model.config, model.schedule, ())
