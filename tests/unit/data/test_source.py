import pytest
from PIL import Image

from dmpctl.data.bundled import Digits
from dmpctl.data.folder import ImageFolder
from dmpctl.data.source import open_source
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.settings.sections import Data


@pytest.fixture
def images(tmp_path):
    Image.new("RGB", (12, 12), "red").save(tmp_path / "a.png")
    return tmp_path


def test_digits_are_bundled():
    assert isinstance(open_source(Data(data="digits"), None, None), Digits)
    with pytest.raises(UsageError, match="8x8"):
        open_source(Data(data="digits"), 64, None)


def test_a_path_is_a_folder_of_images(images):
    source = open_source(Data(data=str(images)), None, None)
    assert isinstance(source, ImageFolder)
    assert source.item(0)[0].shape == (3, 12, 12)


def test_what_the_backbone_wants_goes_before_the_section(images):
    section = Data(data=str(images), size=10, channels=1)
    assert open_source(section, None, None).item(0)[0].shape == (1, 10, 10)
    assert open_source(section, 8, 3).item(0)[0].shape == (3, 8, 8)


def test_a_bare_name_may_be_a_folder_here(images, monkeypatch):
    monkeypatch.chdir(images.parent)
    assert open_source(Data(data=images.name), None, None).name == images.name


def test_home_is_understood(images, monkeypatch):
    monkeypatch.setenv("HOME", str(images.parent))
    assert open_source(Data(data=f"~/{images.name}"), None, None).name == images.name


def test_a_typo_is_answered_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"'digts'; the nearest is 'digits'") as caught:
        open_source(Data(data="digts"), None, None)
    assert caught.value.exit_code == 2
    assert "folder" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["imagenet", "", "x" * 5000, "a\0b"])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(UsageError, match="there is digits"):
        open_source(Data(data=name), None, None)


@pytest.mark.parametrize("name", ["./digts", "data/ffhq", "/nowhere/at/all", "~/no such folder"])
def test_what_looks_like_a_path_is_missing(name):
    with pytest.raises(MissingError, match="there is no folder") as caught:
        open_source(Data(data=name), None, None)
    assert caught.value.exit_code == 3


def test_no_name_is_no_data():
    with pytest.raises(UsageError, match="no data is named"):
        open_source(Data(data=None), None, None)


def test_latent_channels_are_not_image_channels(images):
    with pytest.raises(UsageError, match="1 or 3 channels, not 4"):
        open_source(Data(data=str(images)), None, 4)


def test_bad_files_follow_the_section(images):
    (images / "b.png").write_bytes(b"no image")
    with pytest.raises(IntegrityError):
        open_source(Data(data=str(images)), None, None)
    assert len(open_source(Data(data=str(images), on_bad="skip"), None, None)) == 1
