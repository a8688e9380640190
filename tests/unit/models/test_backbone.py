"""From the word after --base to a frozen backbone."""

import pytest
import torch

from dmpctl.backbones.dit import DiTConfig
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import read_tensors, write_tensors
from dmpctl.models import backbone
from dmpctl.runs.records import EncoderRecord
from dmpctl.settings.sections import Base
from dmpctl.store import locate
from tests.foreign_helpers import pipeline, tiny_pixart


def test_the_bundled_backbone_is_frozen_and_describes_itself():
    loaded = backbone.load_backbone(Base())
    model = loaded.model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert (loaded.data, loaded.spec.latent_shape, len(loaded.spec.sites)) == ("digits", (1, 8, 8), model.config.depth)
    assert loaded.spec.parameters == sum(p.numel() for p in model.parameters())
    assert loaded.digest == backbone.load_backbone(Base()).digest


def test_a_shape_needs_weights():
    with pytest.raises(MissingError, match="no weights for DiT-L/2") as failure:
        backbone.load_backbone(Base(base="DiT-L/2"))
    assert "dmpctl patch --base DiT-L/2 --data DIR --weights FILE" in failure.value.hint
    assert "--hidden-size 1024 --depth 24 --num-heads 16" in failure.value.hint
    with torch.device("meta"):
        assert backbone.planned_model(Base(base="DiT-L/2")).config == DiTConfig(32, 4, 2, 1024, 24, 16, 0)
    assert backbone.is_planned(Base(base="DiT-L/2"))
    assert not backbone.is_planned(Base())


@pytest.mark.parametrize(
    ("name", "hint"),
    [("digit", "did you mean digits?"), ("DiT-XL2", "did you mean DiT-XL/2?"), ("qqq", "name one of digits, a shape")],
)
def test_an_unknown_name_gets_the_nearest(name, hint):
    with pytest.raises(UsageError, match=f"--base {name} is no known backbone") as failure:
        backbone.load_backbone(Base(base=name))
    assert hint in failure.value.hint


def test_what_a_published_backbone_reads_captions_with_is_known(tmp_path, monkeypatch):
    folder = pipeline(tmp_path / "pixart", tiny_pixart())
    monkeypatch.setattr(locate, "require", lambda name, settings: folder)
    assert backbone.load_backbone(Base(base="pixart-256")).text == EncoderRecord(name="pixart-t5")
    assert backbone.load_backbone(Base(base=str(folder))).text is None
    assert backbone.needed_encoder("dit-xl2-256") is None


def test_a_folder_without_a_backbone(tmp_path):
    with pytest.raises(MissingError, match="holds no finished backbone"):
        backbone.load_backbone(Base(base=str(tmp_path)))


def test_a_run_and_its_file_are_the_same_backbone(conditional):
    of_run = backbone.load_backbone(Base(base=str(conditional)))
    of_file = backbone.load_backbone(Base(base=str(conditional / "backbone.safetensors")))
    assert of_run.digest == of_file.digest
    assert of_run.spec == of_file.spec
    assert of_run.spec.num_classes == 10


def test_weights_that_lack_a_tensor_are_refused(conditional, tmp_path):
    tensors, metadata = read_tensors(conditional / "backbone.safetensors")
    del tensors["blocks.1.mlp.fc1.weight"]
    write_tensors(tmp_path / "less.safetensors", tensors, metadata)
    with pytest.raises(IntegrityError, match=r"blocks\.1\.mlp\.fc1\.weight is missing"):
        backbone.load_backbone(Base(base=str(tmp_path / "less.safetensors")))


def test_freezing():
    model = backbone.freeze(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
