"""Folders as diffusers and transformers save them: their scheduler file decides, their weights are checked as files are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dmpctl.errors import IntegrityError, UsageError
from dmpctl.models.backbone import load_backbone
from dmpctl.settings.sections import Base
from tests.faults.unsound import Bad, spoilt
from tests.foreign_helpers import pipeline, tiny_unet
from tests.latent_helpers import tiny_vae


def folder_of(tmp_path: Path, scheduler: Any = None) -> Path:
    folder = pipeline(tmp_path / "pipe", tiny_unet())
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    return folder


def about(**keys: Any) -> dict[str, Any]:
    return {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012} | keys


def visited(folder: Path, sampler: str, steps: int) -> list[int]:
    """The timesteps at which a sampler asks the backbone of a folder."""
    from dmpctl.diffusion.samplers import sample
    from dmpctl.diffusion.schedule import schedule_of

    spec, seen = load_backbone(Base(base=str(folder))).spec, []

    def watching(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return 0.1 * x

    sample(watching, lambda: torch.ones(1, 1, 2, 2), schedule_of(spec.schedule, spec.inference), False, sampler, steps)
    return seen


@pytest.mark.parametrize("steps", [7, 50])
@pytest.mark.parametrize("keys", [{}, {"steps_offset": 1, "set_alpha_to_one": False}, {"timestep_spacing": "trailing"}])
def test_a_scheduler_file_decides_which_timesteps_are_visited(tmp_path, keys, steps):
    import diffusers

    scheduler: Any = diffusers.DDIMScheduler(**about(**keys))
    folder = folder_of(tmp_path, scheduler)
    others = {"ddpm": diffusers.DDPMScheduler, "pndm": diffusers.PNDMScheduler, "ddim": diffusers.DDIMScheduler}
    for name, kind in (others | {"dpm-solver++": diffusers.DPMSolverMultistepScheduler}).items():
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        theirs: Any = kind.from_config(config | {"skip_prk_steps": True})  # as Stable Diffusion's file has it
        theirs.set_timesteps(steps)
        assert visited(folder, name, steps) == theirs.timesteps.tolist(), name


def test_stable_diffusions_own_file(tmp_path):
    """Its PNDM file, as version 1.5 has it: DDIM visits 981, 961 ... 1, and ends where diffusers ends."""
    from diffusers import DDIMScheduler, PNDMScheduler

    from dmpctl.diffusion.samplers import sample
    from dmpctl.diffusion.schedule import schedule_of

    keys = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False, "num_train_timesteps": 1000}
    folder = folder_of(tmp_path, PNDMScheduler(**about(**keys)))
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"clip_sample": False}
    del config["timestep_spacing"]  # which the file has not: each of diffusers' samplers then has its own
    path.write_text(json.dumps(config))
    assert visited(folder, "dpm-solver++", 50)[0] == 999
    assert visited(folder, "ddim", 50) == list(range(981, 0, -20))
    assert visited(folder, "pndm", 50)[:3] == [981, 961, 961]
    spec, start = load_backbone(Base(base=str(folder))).spec, torch.randn(2, 4, 4, 4)
    for name, kind in (("ddim", DDIMScheduler), ("pndm", PNDMScheduler)):
        theirs: Any = kind.from_config(json.loads(path.read_text()))
        theirs.set_timesteps(50)
        x = start
        for t in theirs.timesteps:
            x = theirs.step(torch.tanh(x), t, x).prev_sample
        schedule = schedule_of(spec.schedule, spec.inference)
        found = sample(lambda x, t: torch.tanh(x), lambda: start, schedule, False, name, 50)
        torch.testing.assert_close(found, x, rtol=0, atol=1e-4 * float(x.std()))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_scheduler_file_that_clips_clips(tmp_path, name):
    from diffusers import DDIMScheduler, DDPMScheduler

    from dmpctl.diffusion.samplers import sample
    from dmpctl.diffusion.schedule import schedule_of

    kind: Any = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[name]
    theirs = kind(**about(clip_sample=True, clip_sample_range=0.5))
    spec = load_backbone(Base(base=str(folder_of(tmp_path, theirs)))).spec
    theirs.set_timesteps(20)
    draw, ours = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 4, 4, generator=draw)
    for t in theirs.timesteps:
        x = theirs.step(torch.tanh(x), t, x, generator=draw).prev_sample
    found = sample(
        lambda x, t: torch.tanh(x),
        lambda: torch.randn(2, 4, 4, 4, generator=ours),
        schedule_of(spec.schedule, spec.inference),
        False,
        name,
        20,
    )
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trained_betas", [0.1, 0.2]),
        ("rescale_betas_zero_snr", True),
        ("thresholding", True),
        ("prediction_type", "v_prediction"),
        ("use_flow_sigmas", True),
        ("timestep_spacing", "sideways"),
        ("steps_offset", "one"),
        ("a_new_key", 3),
    ],
)
def test_a_key_of_a_scheduler_file_that_is_not_had_is_refused_by_name(tmp_path, key, value):
    from diffusers import DDIMScheduler

    folder = folder_of(tmp_path, DDIMScheduler(**about()))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UsageError, match=key if key != "prediction_type" else "predicts v_prediction"):
        load_backbone(Base(base=str(folder)))


def test_the_way_of_sampling_goes_along_with_an_exported_model(tmp_path):
    from diffusers import DDIMScheduler

    from dmpctl.files import write_tensors
    from dmpctl.models.backbone import metadata_of

    loaded = load_backbone(Base(base=str(folder_of(tmp_path, DDIMScheduler(**about(steps_offset=1))))))
    write_tensors(tmp_path / "a.safetensors", loaded.model.state_dict(), metadata_of(loaded))
    assert load_backbone(Base(base=str(tmp_path / "a.safetensors"))).spec == loaded.spec


def test_weights_in_fp16_alone_are_read(tmp_path):
    folder = folder_of(tmp_path)
    expected = {name: value.half().float() for name, value in load_backbone(Base(base=str(folder))).model.state_dict().items()}
    tiny_unet().half().save_pretrained(folder / "unet", variant="fp16")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    found = load_backbone(Base(base=str(folder))).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    tiny_unet().bfloat16().save_pretrained(folder / "unet", variant="bf16")
    with pytest.raises(IntegrityError, match="weights as bf16 and fp16"):
        load_backbone(Base(base=str(folder)))


def test_an_autoencoder_in_fp16_alone_is_read(tmp_path):
    from diffusers import AutoencoderKL

    from dmpctl.codecs.vae import Vae

    tiny_vae(tmp_path / "plain")
    model: Any = AutoencoderKL.from_pretrained(tmp_path / "plain")
    model.half().save_pretrained(tmp_path / "half", variant="fp16")
    images = torch.randint(0, 255, (1, 3, 16, 16), dtype=torch.uint8)
    found, plain = (Vae(tmp_path / name, name) for name in ("half", "plain"))
    torch.testing.assert_close(found.encode(images).mean, plain.encode(images).mean, rtol=0, atol=1e-2)
    assert found.fingerprint != plain.fingerprint


@pytest.mark.parametrize("how", ["nan", "int"])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_folders_with_such_numbers_are_refused_too(tmp_path, part, how):
    from safetensors.torch import load_file

    from dmpctl.codecs.vae import Vae

    folder = folder_of(tmp_path)
    tiny_vae(folder / "vae")
    path = folder / part / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    name = next(name for name, value in state.items() if value.ndim == 4)
    save_file(spoilt(state, name, how), path, {"format": "pt"})
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    use = {"unet": lambda: load_backbone(Base(base=str(folder))), "vae": lambda: Vae(folder, "vae").encode(images)}[part]
    with pytest.raises(IntegrityError, match=name):
        use()


def test_a_pickle_in_a_folder_gets_the_same_sentence(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Bad()}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(IntegrityError, match="holds more than tensors") as caught:
        load_backbone(Base(base=str(folder)))
    assert "weights_only" not in caught.value.message
