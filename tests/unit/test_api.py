"""The six names for Python, and a patch on a model of diffusers that a pipeline goes on calling."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import dmpctl
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.models.patched import predict_patched
from dmpctl.sampling.generate import generate
from dmpctl.sampling.pictures import read_png
from tests.foreign_helpers import TOKENS, WIDTH, pipeline, tiny_dit, tiny_pixart, tiny_unet
from tests.helpers import colour_folder, environment, settings_for
from tests.latent_helpers import tiny_vae

SMALL = {"iters": 3, "batch_size": 8, "save_every": 3, "cpu": True, "prompt_lr": 0.1}
DRAW = torch.Generator().manual_seed(3)
X, T = torch.randn(2, 4, 8, 8, generator=DRAW), torch.tensor([7, 7])
STATES = torch.randn(2, TOKENS, WIDTH, generator=DRAW)
MASK = torch.arange(TOKENS) < torch.tensor([[3], [TOKENS]])


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, dmpctl; print('torch' in sys.modules); dmpctl.load_patch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dmpctl.nothing
    assert {"apply", "load_backbone", "load_patch", "measure", "sample", "train"} < set(dmpctl.__all__)


def test_train_sample_and_measure(tmp_path, cli):
    patched = dmpctl.train(tmp_path / "run", **SMALL)
    assert patched.step == 3
    images = dmpctl.sample(patched, 5, sampler="ddim", steps=3, cpu=True)
    assert torch.equal(
        images, generate(patched, range(5), settings_for("sample", sampler="ddim", steps=3).sampling, torch.device("cpu"))
    )
    assert (
        cli(
            "sample", tmp_path / "run", "--num-images", 5, "--sampler", "ddim", "--steps", 3, "--cpu", "--out", tmp_path / "out"
        ).code
        == 0
    )
    assert all(torch.equal(images[k], read_png(tmp_path / "out" / f"{k:06d}.png")) for k in range(5))
    given = {"sampler": "ddim", "steps": 3, "cpu": True, "max_images": 70}
    found = dmpctl.measure(tmp_path / "run", **given)
    line = ("--sampler", "ddim", "--steps", 3, "--cpu", "--max-images", 70, "--json")
    assert found["value"] == json.loads(cli("fid", tmp_path / "run", *line).out)["value"]
    plain = dmpctl.sample(dmpctl.load_backbone(), 5, sampler="ddim", steps=3, cpu=True)
    assert not torch.equal(plain, images)
    again = dmpctl.apply(dmpctl.load_backbone(), dmpctl.load_patch(tmp_path / "run"))
    assert torch.equal(dmpctl.sample(again, 5, sampler="ddim", steps=3, cpu=True), images)


def test_a_wrong_option_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="steps"):
        dmpctl.sample(dmpctl.load_backbone(), 1, steps=0)
    with pytest.raises(UsageError, match="prompts are for a text-conditional model"):
        dmpctl.sample(dmpctl.load_backbone(), 1, prompts="a cat", cpu=True)


CALLS = {
    "dit": (tiny_dit, "linear", lambda model, y: model(X, timestep=T, class_labels=y).sample),
    "pixart": (
        tiny_pixart,
        None,
        lambda model, y: (
            model(X, STATES, T, {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=MASK.long()).sample
        ),
    ),
    "sd": (tiny_unet, "scaled_linear", lambda model, y: model(X, torch.tensor(7), encoder_hidden_states=STATES).sample),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_model_of_diffusers_is_patched_in_place(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make, schedule, call = CALLS[kind]
    folder = pipeline(tmp_path / "pipe", make(), schedule, text=kind != "dit")
    tiny_vae(folder / "vae")
    colour_folder(tmp_path / "images", 5)
    for path in sorted((tmp_path / "images").iterdir())[5:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    patched = dmpctl.train(tmp_path / "run", base=str(folder), data=str(tmp_path / "images"), gate_lr=0.1, **SMALL)
    labels = torch.tensor([0, 3])
    text = torch.cat([STATES, MASK.float().unsqueeze(-1)], -1)
    cond = labels if kind == "dit" else text
    expected = predict_patched(patched.backbone.model, patched.patch.time_only, patched.patch, X, T, cond)[0]

    model = make()
    plain = call(model, labels)
    pipe = SimpleNamespace(**{"unet" if kind == "sd" else "transformer": model})
    assert dmpctl.apply(pipe, patched) is pipe
    torch.testing.assert_close(call(model, labels), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, plain, atol=1e-4)
    dmpctl.apply(pipe, patched)  # once more is the same as once
    torch.testing.assert_close(call(model, labels), expected, rtol=0, atol=1e-6)
    dmpctl.apply(model, None)
    assert torch.equal(call(model, labels), plain)

    other = make()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(IntegrityError, match="trained on other weights"):
        dmpctl.apply(other, patched)
    with pytest.warns(UserWarning, match="not in float32"):
        dmpctl.apply(make().bfloat16(), patched)


def test_a_whole_pipeline_of_diffusers(tmp_path, monkeypatch):
    """Stable Diffusion's own pipeline, guidance and scheduler: other images with a patch, the same again without."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = pipeline(tmp_path / "pipe", tiny_unet(), "scaled_linear", text=True)
    tiny_vae(folder / "vae")
    colour_folder(tmp_path / "images", 20)
    patched = dmpctl.train(tmp_path / "run", base=str(folder), data=str(tmp_path / "images"), gate_lr=0.1, **SMALL)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=tiny_unet(),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)

    def image() -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        return pipe("a cat", height=16, width=16, num_inference_steps=3, generator=draw, output_type="pt").images

    plain = image()
    assert dmpctl.apply(pipe, patched) is pipe
    assert (image() - plain).abs().max() > 1e-4
    dmpctl.apply(pipe, None)
    assert torch.equal(image(), plain)


def test_what_cannot_be_patched_is_said(tmp_path):
    patched = dmpctl.train(tmp_path / "run", **SMALL)
    with pytest.raises(UsageError, match="a Linear cannot be patched"):
        dmpctl.apply(torch.nn.Linear(2, 2), patched)
    with pytest.raises(UsageError, match="holds no model"):
        dmpctl.apply("pipe", patched)
    with pytest.raises(IntegrityError, match="another shape"):
        dmpctl.apply(tiny_dit(), patched)
    full = dmpctl.train(tmp_path / "full", method="full", iters=1, batch_size=8, cpu=True)
    with pytest.raises(UsageError, match="only prompts can be applied"):
        dmpctl.apply(tiny_dit(), full)
