"""Training on cached latents is training on images encoded as they come: same losses, given the same noise."""

import json

import pytest
import torch

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.codecs.vae import Vae
from dmpctl.models.encode import build_latents
from dmpctl.processes.accelerator import accelerator_for
from dmpctl.runs.records import Description
from dmpctl.runs.rundir import RunDir
from dmpctl.training.session import Session, train_in
from dmpctl.training.subject import Subject
from dmpctl.training.trainer import Trainer
from dmpctl.types import Silent
from tests.helpers import colour_folder, same_but_time, settings_for, tensors_of
from tests.latent_helpers import TINY_SIDE, tiny_vae
from tests.unit.data.made import folder_images

IMAGES = 20
SIDE = TINY_SIDE // 2


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return Vae(tiny_vae(tmp_path_factory.mktemp("vae")), "tiny", 1)  # one at a time: an image's latents know no batch


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return folder_images(colour_folder(tmp_path_factory.mktemp("data") / "colours", IMAGES, TINY_SIDE))


@pytest.fixture(scope="module")
def cached(codec, images, tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    return {
        dtype: build_latents(images, codec, root, Silent(), dtype=dtype, per_shard=8) for dtype in (torch.float16, torch.float32)
    }


def trained(run, source, codec, **given):
    """A small backbone on latents, trained as `pretrain` does on this very source; the lines of its metrics."""
    given = {
        "iters": 6,
        "batch_size": 8,
        "log_every": 1,
        "save_every": 3,
        "class_conditional": True,
        "cpu": True,
        "latents": False,
        **given,
    }
    settings = settings_for("pretrain", data="digits", run=run, **given)
    config = DiTConfig(SIDE, 4, 2, 16, 2, 2, source.num_classes)
    model = DiT(config).train()
    model.initialise(torch.Generator().manual_seed(0))
    session = Session(Subject(model, None, Description(schema_version=1), lr=1e-3), codec, source, None, {}, {})
    with RunDir(run) as opened:
        train_in(opened, session, settings, accelerator_for(settings), Silent())
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_cached_equals_online(tmp_path, images, codec, cached):
    online = trained(tmp_path / "online", images, codec)
    exact = trained(tmp_path / "exact", cached[torch.float32], codec)
    half = trained(tmp_path / "half", cached[torch.float16], codec)
    assert same_but_time(exact) == same_but_time(online)
    weights = [tensors_of(tmp_path / run / "backbone.safetensors") for run in ("online", "exact")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [[line["loss"] for line in lines] for lines in (online, half)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1] != losses[0]
    assert len(set(losses[0])) == 6


def test_the_same_image_has_other_latents_in_every_step(tmp_path, cached, codec):
    """Moments are kept, not samples: with the data down to one batch, x0 differs from step to step."""
    seen = []

    class Eye:
        """Cannot encode: nothing that is cached is encoded again."""

        name, fingerprint, scale = codec.name, codec.fingerprint, codec.scale

    real = Trainer._noised

    def noted(self, inputs):
        batch = real(self, inputs)
        seen.append((inputs.images, batch.x0))
        return batch

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_noised", noted)
        trained(tmp_path / "run", cached[torch.float32], Eye(), batch_size=IMAGES, hflip=False, iters=2)
    (first, x0), (second, later) = ((moments[order(moments)], x[order(moments)]) for moments, x in seen)
    assert torch.equal(first, second)
    assert not torch.equal(x0, later)
    spread = (0.5 * first[:, 4:]).exp()
    assert 0.8 < float(((x0 - first[:, :4]) / spread).std()) < 1.2


def order(moments):
    return moments.flatten(1).double().sum(1).argsort()


def test_a_resumed_run_on_cached_latents_equals_an_uninterrupted_one(tmp_path, cached, codec):
    whole = trained(tmp_path / "whole", cached[torch.float16], codec)
    trained(tmp_path / "parts", cached[torch.float16], codec, iters=4)
    assert same_but_time(trained(tmp_path / "parts", cached[torch.float16], codec, num_workers=1)) == same_but_time(whole)
