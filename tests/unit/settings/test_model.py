"""Building the model looks at nothing but its arguments, and survives config.json."""

import json

import pytest
from pydantic import ValidationError

from dmpctl.errors import IntegrityError
from dmpctl.settings.layers import resolve
from dmpctl.settings.methods import Dmp
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Data, Shape
from dmpctl.settings.training import Train


def test_the_environment_is_not_read(monkeypatch):
    for name in ("TRAIN", "DMPCTL_ITERS", "ITERS", "RUN"):
        monkeypatch.setenv(name, '{"iters": 3}')
    assert Settings() == Settings(train=Train())
    assert Settings().train.iters == 50_000


@pytest.mark.parametrize("command", ["patch", "pretrain", "sample"])
def test_what_is_recorded_comes_back(command, tmp_path):
    given = {"run": str(tmp_path / "r")} if command != "sample" else {"out": str(tmp_path)}
    settings = resolve(command, given).settings
    again = Settings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert again.science() == settings.science()


def test_only_the_sections_of_the_command_are_recorded():
    recorded = resolve("pretrain", {}).settings.to_dict()
    assert "shape" in recorded
    assert "method" not in recorded
    assert recorded["train"].keys() == Train.model_fields.keys()


def test_science_leaves_out_what_may_change():
    science = resolve("patch", {"iters": "7"}).settings.science()
    assert science["iters"] == 7
    assert science["gate"] == "soft"
    assert not {"run", "base", "weights", "preset", "num_workers", "save_every", "device", "steps", "quiet"} & set(science)


@pytest.mark.parametrize(
    "recorded", [{"nothing": {}}, {"train": {"itrs": 3}}, {"train": {"iters": 0}}, {"method": {"method": "x"}}]
)
def test_recorded_settings_that_do_not_fit(recorded):
    with pytest.raises(IntegrityError, match="do not fit this dmpctl") as caught:
        Settings.from_dict(recorded)
    assert "\n" not in caught.value.message


def test_patches_of_the_shape_fill_the_images():
    with pytest.raises(ValidationError, match="size 7 is not a multiple of patch_size 2"):
        Settings(shape=Shape(), data=Data(size=7))
    assert Settings(data=Data(size=7))  # the shape is the backbone's, unknown here
    assert Settings(shape=Shape(), data=Data(size=8))


def test_the_method_is_told_by_its_tag():
    assert Settings(method={"method": "dmp", "prompts": 4}).method == Dmp(prompts=4)
    with pytest.raises(ValidationError):
        Settings(method={"method": "dpm"})
