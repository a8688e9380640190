"""The one door from a word to a thing: a path, a name or an address, and the sentence for a word that is nothing."""

from pathlib import Path

import pytest

from dmpctl.errors import DmpError
from dmpctl.settings.assets import AssetRow, Assets
from dmpctl.settings.model import Settings
from dmpctl.store.locate import HubRows, lasting_data, locate, locate_data


@pytest.mark.parametrize(
    ("word", "kind", "sentence", "hint"),
    [
        ("dit-xl2-25", "backbone", "--base dit-xl2-25 is no known backbone", "did you mean dit-xl2-256?"),
        ("facebook/DiT-XL-2-256", "backbone", "name of a model on the Hub", "dit-xl2-256 or hf://facebook/DiT-XL-2-256"),
        ("own/er", "weights", "name of a model on the Hub", "hf://own/er"),
        ("stabilityai/sd-vae-ft-ema", "codec", "name of a model on the Hub", "write vae-ema"),
        ("openai/clip-vit-large-patch14", "text", "name of a model on the Hub", "write clip-l"),
        ("vae-ema", "backbone", "--base vae-ema is no backbone but SD VAE", "name one, such as dit-xl2-256"),
        ("hf://datasets/a/b", "backbone", "--base hf://datasets/a/b is no model of the Hub", "hf://OWNER/NAME"),
        ("hf://a/b", "run", "hf://a/b is not in the cache", "run dmpctl download hf://a/b"),
        ("nothing.pt", "weights", "nothing.pt is not there", "name a file"),
        ("http://example.org/x", "weights", "is no https address of a file", "https://HOST"),
        ("vae-msx", "codec", "--codec vae-msx is no known codec", "did you mean vae-mse?"),
        ("no/vae", "codec", "there is no folder no/vae with a codec", "--codec FOLDER"),
        ("t5", "text", "there is no text encoder t5", "one of clip-l, pixart-t5"),
        ("clip", "clip", "there is no CLIP clip", "name a folder, or clip-l"),
        ("clip-l", "clip", r"clip-l .* is not in the cache", "run dmpctl download clip-l"),
    ],
)
def test_a_word_that_is_nothing_gets_a_sentence_of_its_kind(word, kind, sentence, hint, tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DmpError, match=sentence) as failure:
        locate(word, kind)
    assert hint in str(failure.value.hint)


def test_a_path_goes_before_a_name_but_not_for_a_codec(tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("clip-l", "vae-ema", "dit-xl2-256"):
        Path(name).mkdir()
    assert locate("clip-l", "text") == locate("clip-l", "clip") == Path("clip-l")
    assert locate("dit-xl2-256", "backbone") == Path("dit-xl2-256")
    with pytest.raises(DmpError, match=r"vae-ema .* is not in the cache"):
        locate("vae-ema", "codec")


def test_a_run_is_whatever_path_was_given():
    assert locate(Path("runs/none"), "run") == Path("runs/none")


def test_images_by_name_address_and_row(tmp_path):
    settings = Settings(assets=Assets(rows=(AssetRow(name="mine", kind="data", repo="o/n", allow=("*",)),)))
    assert lasting_data("mine", settings) == "hf://o/n@main"
    found = locate_data("mine", settings)
    assert isinstance(found, HubRows)
    assert (found.shown, found.name, found.folder) == ("hf://o/n@main", "o/n", None)
    published = locate_data("laion-art", streaming=True)
    assert isinstance(published, HubRows)
    assert (published.shown, published.name) == ("laion-art (fantasyfish/laion-art)", "laion-art")
    assert published.command == "dmpctl download laion-art"
    assert locate_data(str(tmp_path)) == tmp_path
    assert locate_data("digits") == "digits"
