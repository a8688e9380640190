"""Which codec a command gets, and what a backbone's file says of it."""

import json
import shutil

import pytest
import torch

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.dit_weights import dit_metadata, read_weights
from dmpctl.codecs.identity import Identity
from dmpctl.codecs.vae import Vae
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import write_tensors
from dmpctl.models.codec import codec_record, open_codec
from dmpctl.store import locate
from dmpctl.types import ScheduleSpec
from tests.helpers import settings_for
from tests.latent_helpers import tiny_vae

CONFIG = DiTConfig(8, 4, 2, 16, 1, 2, 0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("assets")
    tiny_vae(root / "vae-ema")
    tiny_vae(root / "vae-mse", seed=1)
    return root


@pytest.fixture
def opened(cache, monkeypatch):
    """Open the codec after --codec, where the published ones lie in the cache of downloads."""
    monkeypatch.setattr(locate, "require", lambda name, settings: cache / name)

    def codec_of(choice, **known):
        return open_codec(settings_for("patch", codec=choice, codec_batch=3), **known)

    return codec_of


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_auto_is_pixels_where_nothing_speaks_of_latents(opened, channels):
    assert isinstance(opened("auto", channels=channels), Identity)


def test_auto_takes_what_the_published_backbones_were_trained_with(opened):
    codec = opened("auto", channels=4)
    assert isinstance(codec, Vae)
    assert (codec.name, codec.batch) == ("vae-ema", 3)
    with pytest.raises(UsageError, match="latents of 16 channels"):
        opened("auto", channels=16)


def test_auto_takes_what_the_backbone_was_trained_with(opened, cache):
    recorded = codec_record(Vae(cache / "vae-mse", "vae-mse"))
    assert opened("auto", channels=4, recorded=recorded).name == "vae-mse"
    assert opened("auto", channels=4, recorded=codec_record(Identity())).name == "identity"
    folder = codec_record(opened(str(cache / "vae-mse")))
    assert folder.name == str(cache / "vae-mse")
    assert opened("auto", recorded=folder).fingerprint == recorded.fingerprint


def test_auto_refuses_another_than_was_recorded(opened, cache):
    recorded = codec_record(Vae(cache / "vae-ema", "vae-ema")).model_copy(update={"name": "vae-mse"})
    with pytest.raises(IntegrityError, match=r"the codec vae-mse has sha256 .*, the backbone was trained with ") as caught:
        opened("auto", channels=4, recorded=recorded)
    assert caught.value.exit_code == 4


def test_another_decoder_may_be_named_but_no_other_scale(opened, cache, tmp_path):
    recorded = codec_record(Vae(cache / "vae-ema", "vae-ema"))
    assert opened("vae-mse", channels=4, recorded=recorded).name == "vae-mse"
    shutil.copytree(cache / "vae-ema", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"scaling_factor": 0.13025}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"scales latents by 0\.13025, the backbone's by 0\.18215"):
        opened(str(tmp_path / "other"), channels=4, recorded=recorded)


def test_what_is_not_there_is_said_with_the_way_out(opened, tmp_path):
    with pytest.raises(UsageError, match="--codec vae-em is no known codec") as caught:
        opened("vae-em")
    assert caught.value.hint == "did you mean vae-ema?"
    with pytest.raises(UsageError, match="no known codec") as caught:
        opened("qwxz")
    assert "identity, vae-ema, vae-mse, or a folder" in str(caught.value.hint)
    with pytest.raises(MissingError, match="there is no folder"):
        opened(str(tmp_path / "none"))
    with pytest.raises(MissingError, match="holds no autoencoder"):
        opened(str(tmp_path))


def test_a_backbone_carries_its_codec(opened, tmp_path):
    tensors = DiT(CONFIG).state_dict()
    record = codec_record(opened("vae-ema"))
    assert set(record.to_json()) == {"name", "fingerprint", "scale"}
    write_tensors(tmp_path / "with.safetensors", tensors, dit_metadata(CONFIG, ScheduleSpec(), "faces", record))
    assert read_weights(tmp_path / "with.safetensors").codec == record
    write_tensors(tmp_path / "without.safetensors", tensors, dit_metadata(CONFIG, ScheduleSpec(), "faces"))
    assert read_weights(tmp_path / "without.safetensors").codec is None
    torch.save(dict(tensors), tmp_path / "theirs.pt")
    assert read_weights(tmp_path / "theirs.pt").codec is None


@pytest.mark.parametrize("codec", [{"name": "vae-ema"}, "vae-ema", 3])
def test_a_codec_that_cannot_be_read_is_an_integrity_error(tmp_path, codec):
    said = json.loads(dit_metadata(CONFIG, ScheduleSpec(), None)["dmpctl.dit"]) | {"codec": codec}
    write_tensors(tmp_path / "odd.safetensors", DiT(CONFIG).state_dict(), {"dmpctl.dit": json.dumps(said)})
    with pytest.raises(IntegrityError, match="describes itself in a way that cannot be read"):
        read_weights(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("command", ["patch", "pretrain"])
def test_the_options_are_there_and_make_no_other_experiment(command):
    given = {"codec": "vae-mse", "codec_batch": 4, "latents": False}
    plain, other = settings_for(command), settings_for(command, **given)
    assert (plain.codec.codec, plain.codec.latents) == ("auto", True)
    assert other.codec.model_dump() == given
    assert plain.science() == other.science()  # the codec's fingerprint is compared instead
