"""[assets.NAME] of a settings file: rows of the registry, and one sentence for what is wrong with one."""

import pytest

from dmpctl.errors import UsageError
from dmpctl.settings.assets import AssetRow, is_safe
from dmpctl.settings.layers import resolve
from dmpctl.settings.model import Settings

DIGEST = "ab" * 32


@pytest.fixture
def rows(tmp_path):
    def read(text: str, command: str = "patch"):
        path = tmp_path / "x.toml"
        path.write_text(text)
        return resolve(command, {}, path).settings.assets.rows

    return read


@pytest.mark.parametrize("command", ["download", "patch", "fid", "doctor"])
def test_rows_reach_every_command(rows, command):
    text = f"""
    iters = 5
    [assets.mine]
    what = "my weights"
    url = "https://example.org/a/mine.pt"
    sha256 = "{DIGEST}"
    non-commercial = true
    license = "mine"
    [assets.data]
    repo = "owner/name"
    dataset = true
    allow = ["*.parquet"]
    [patch]
    batch-size = 3
    """
    mine, data = rows(text, command)
    assert (mine.name, mine.filename, mine.sha256, mine.non_commercial) == ("mine", "mine.pt", DIGEST, True)
    assert (mine.licence, mine.source) == ("mine", "https://example.org/a/mine.pt")
    assert (data.source, data.patterns, data.pinned) == ("hf://datasets/owner/name@main", ("*.parquet",), False)


def test_rows_are_recorded_with_a_run_and_make_it_no_other_experiment(rows, tmp_path):
    assert rows("[assets.mine]\nurl = 'https://example.org/m.pt'\n")
    settings = resolve("patch", {}, tmp_path / "x.toml").settings
    assert Settings.from_dict(settings.to_dict()) == settings
    assert "rows" not in settings.science()
    assert "assets" not in resolve("patch", {}).settings.to_dict()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("assets = 3", "x.toml: an asset is a table [assets.NAME]"),
        ("[assets]\nmine = 3", "x.toml: an asset is a table [assets.NAME]"),
        ("[assets.m]\nurll = 'https://x/y'", "x.toml [assets.m]: urll is no key of an asset"),
        ("[assets.m]\nname = 'x'", "[assets.m]: name is no key of an asset"),
        ("[assets.m]\nwhat = 'x'", "[assets.m]: it needs url or repo"),
        ("[assets.m]\nurl = 'https://x/y'\nrepo = 'a/b'", "[assets.m]: url and repo contradict each other"),
        ("[assets.m]\nurl = 'http://example.org/y'", "[assets.m]: url http://example.org/y is not https"),
        ("[assets.m]\nurl = 'file:///etc/passwd'", "is not https"),
        ("[assets.m]\nurl = 'https://example.org/'", "names no file"),
        ("[assets.m]\nrepo = 'a/b'", "repo needs file, or patterns of files in allow"),
        ("[assets.m]\nrepo = 'a/b/c'\nfile = 'x'", "[assets.m]: repo takes OWNER/NAME"),
        ("[assets.m]\nrepo = 'a/b'\nfile = '../x'", "name files inside the repository"),
        ("[assets.m]\nurl = 'https://x/y'\nfile = '/etc/x'", "name files inside the repository"),
        ("[assets.m]\nurl = 'https://x/y'\nsha256 = 'abc'", "[assets.m]: sha256 takes 64 hexadecimal digits"),
        ("[assets.m]\nurl = 'https://x/y'\nsize = -1", "[assets.m]: size takes a whole number of 0 or more"),
        ("[assets.'../m']\nurl = 'https://x/y'", "is no name"),
    ],
)
def test_what_is_wrong_is_one_sentence(rows, text, sentence):
    with pytest.raises(UsageError) as failure:
        rows(text)
    assert sentence in failure.value.message
    assert "\n" not in failure.value.message


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://example.org/x", True),
        ("http://127.0.0.1:80/x", True),
        ("http://[::1]/x", True),
        ("http://localhost:80/x", True),
        ("http://localhost.example.org/x", False),
        ("http://127.0.0.1.example.org/x", False),
        ("http://10.0.0.1/x", False),
        ("ftp://example.org/x", False),
        ("https:///x", False),
    ],
)
def test_plain_http_stays_on_this_machine(url, safe):
    assert is_safe(url) is safe


def test_a_commit_is_a_pin_and_a_branch_is_none():
    row = AssetRow(name="x", repo="a/b", file="c")
    assert [row.model_copy(update={"revision": it}).pinned for it in (None, "main", "a" * 39, "a" * 40)] == [False] * 3 + [True]
