"""Repositories of the Hub, against one in miniature on this machine: pinned, whole, checked, and found again offline."""

import hashlib
import socket

import pytest

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.settings.assets import AssetRow, Assets
from dmpctl.store import cache, hub
from dmpctl.store import download as download_command
from dmpctl.store.addresses import of_files
from dmpctl.store.cache import Fact
from dmpctl.store.fetch import cached, entry_of, require
from dmpctl.store.locate import fetch_weights
from dmpctl.store.registry import row_at
from dmpctl.types import Silent
from tests.helpers import files, flip, settings_for
from tests.standin import COMMIT, Answer, Repository, running
from tests.unit.store.test_https import Talk

WEIGHTS = bytes(range(256)) * 200
CONFIG = b'{"small": 1}'
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "model.bin": b"pickle" * 20, "data/a.parquet": b"rows" * 50}
FOLDER = "hub/models--owner--name"
RESOLVE = f"/owner/name/resolve/{COMMIT}/model.safetensors"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with running() as standin:
        standin.repositories["models/owner/name"] = Repository(dict(FILES))
        standin.repositories["datasets/owner/rows"] = Repository({"data/a.parquet": b"rows" * 50, "README.md": b"card"})
        monkeypatch.setenv("HF_ENDPOINT", standin.url)
        monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
        yield standin


def row(**values):
    return AssetRow(**{"name": "thing", "repo": "owner/name", "file": "model.safetensors", "allow": ("config.json",)} | values)


def settings(it, **options):
    return settings_for("download", **options).model_copy(update={"assets": Assets(rows=(it,))})


def download(it, talk=None, **options):
    return download_command.download(settings(it, **options), [it.name], talk or Silent())


def snapshot(tmp_path):
    return tmp_path / "cache" / FOLDER / "snapshots" / COMMIT


def test_the_wanted_files_of_one_commit(server, tmp_path):
    talk = Talk()
    [found] = download(row(), talk).data["files"]
    assert files(snapshot(tmp_path)) == {"config.json", "model.safetensors"}
    assert (found["path"], found["revision"], found["source"]) == (str(snapshot(tmp_path)), COMMIT, "hf://owner/name@main")
    assert talk.tracked == [("fetching thing", len(WEIGHTS) + len(CONFIG), 0, "B")]
    assert talk.done == len(WEIGHTS) + len(CONFIG)
    entry = entry_of(row())
    assert entry is not None
    assert entry.files["model.safetensors"] == Fact(sha256=hashlib.sha256(WEIGHTS).hexdigest(), size=len(WEIGHTS))
    assert (tmp_path / "cache" / FOLDER / "refs" / "main").read_text() == COMMIT


def test_one_file_is_a_path_to_it(server, tmp_path):
    assert download(row(allow=())).data["files"][0]["path"] == str(snapshot(tmp_path) / "model.safetensors")
    assert files(snapshot(tmp_path)) == {"model.safetensors"}


def test_a_data_set(server, tmp_path):
    it = AssetRow(name="rows", repo="owner/rows", dataset=True, kind="data", allow=("*.parquet",))
    found = download(it).data["files"][0]["path"]
    assert found == str(tmp_path / "cache/hub/datasets--owner--rows/snapshots" / COMMIT)
    assert files(tmp_path / "cache/hub/datasets--owner--rows/snapshots" / COMMIT) == {"data/a.parquet"}


def test_what_is_there_asks_nobody(server, tmp_path, no_connection):
    download(row())
    asked = len(server.asked)

    no_connection()
    assert download(row(), offline=True).data["files"][0]["path"] == str(snapshot(tmp_path))
    assert require("thing", settings(row())) == snapshot(tmp_path)
    with pytest.raises(MissingError, match="not in the cache: other, and --offline") as failure:
        download(row(name="other", repo="owner/other"), offline=True)
    assert failure.value.hint == "online: dmpctl download other"
    assert len(server.asked) == asked


def test_main_stays_what_it_was_at_the_first_download(server, tmp_path):
    download(row())
    (snapshot(tmp_path) / "config.json").unlink()
    server.repositories["models/owner/name"].commit = "b" * 40
    with pytest.raises(MissingError, match="has no revision"):  # the stand-in has one commit at a time
        download(row())
    assert f"/api/models/owner/name/revision/{COMMIT}" in [path for _, path, _ in server.asked]


def test_what_another_program_fetched_is_used(server, tmp_path):
    pinned = row(revision=COMMIT)
    folder = snapshot(tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    assert cached("thing", settings(pinned)) is None
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    assert cached("thing", settings(pinned)) == folder
    assert cached("thing", settings(row(revision=COMMIT, allow=("*.json",)))) is None  # who knows whether that is all
    download(row(revision=COMMIT, sha256=hashlib.sha256(WEIGHTS).hexdigest()))
    with pytest.raises(IntegrityError, match=f"expected {'0' * 64}"):
        download(row(revision=COMMIT, sha256="0" * 64))
    assert server.asked == []


def test_one_flipped_bit_is_found(server, tmp_path):
    download(row())
    flip(snapshot(tmp_path) / "model.safetensors", 100)
    for options in ({}, {"verify": True}):
        with pytest.raises(IntegrityError, match=r"model\.safetensors is damaged: it has sha256 .*, expected [0-9a-f]{64}"):
            download(row(), **options)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_bytes_of_the_right_size_are_removed(server, tmp_path, name):
    wrong = bytearray(FILES[name])
    wrong[3] ^= 1
    server.script[f"/owner/name/resolve/{COMMIT}/{name}"] += [Answer(body=bytes(wrong))]
    with pytest.raises(IntegrityError, match=rf"{name} has hash [0-9a-f]+, expected") as failure:
        download(row())
    assert failure.value.exit_code == 4
    assert cached("thing", settings(row())) is None
    download(row())
    assert (snapshot(tmp_path) / name).read_bytes() == FILES[name]


def test_another_hash_than_the_row_knows(server):
    with pytest.raises(IntegrityError, match=f"expected {'0' * 64}"):
        download(row(sha256="0" * 64))


def test_a_server_in_trouble_is_asked_again(server, tmp_path):
    server.script["/api/models/owner/name"] += [Answer(503)]
    server.script[RESOLVE] += [Answer(502)]
    talk = Talk()
    download(row(allow=()), talk)
    assert "HTTP 503" in talk.said[0]  # of the 502 the library may see to itself
    assert (snapshot(tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_nobody_answers(server, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(MissingError, match=r"cannot fetch thing: the connection broke .*after 6 attempts") as failure:
            download(row())
    assert failure.value.exit_code == 3


def test_a_gated_repository_names_its_page_and_the_token_which_is_not_shown(server, monkeypatch):
    server.repositories["models/owner/name"].gated = True
    with pytest.raises(MissingError, match="is gated: its terms must be accepted first") as failure:
        download(row())
    assert failure.value.hint == f"open {server.url}/owner/name, accept its terms, then set HF_TOKEN (or run hf auth login)"
    monkeypatch.setenv("HF_TOKEN", "hf_" + "secret" * 5)
    talk = Talk()
    report = download(row(), talk)
    assert "secret" not in str(report) + str(talk.said)


def test_what_is_not_there(server):
    with pytest.raises(MissingError, match=r"there is no http.*/owner/gone, or it is private") as failure:
        download(row(repo="owner/gone", alternative="laion-subset"))
    assert failure.value.hint == "take laion-subset instead"
    with pytest.raises(MissingError) as failure:
        download(row(repo="owner/gone"))
    assert "hf://datasets/owner/gone" in failure.value.hint
    with pytest.raises(MissingError, match="has no revision v2"):
        download(row(revision="v2"))
    with pytest.raises(MissingError, match=r"holds no other\.safetensors"):
        download(row(file="other.safetensors"))
    with pytest.raises(MissingError, match=r"holds no \*.parquet2"):
        download(row(file=None, allow=("*.parquet2",)))


def test_the_disk_is_looked_at_first(server, monkeypatch):
    monkeypatch.setattr(cache, "MARGIN", 10**18)
    with pytest.raises(UsageError, match="thing needs"):
        hub.fetch_repo(row(), None, Silent())
    assert [method for method, path, _ in server.asked if "resolve" in path] == []


@pytest.mark.parametrize(
    ("address", "repo", "revision", "file", "dataset"),
    [
        ("hf://a/b", "a/b", None, None, False),
        ("hf://a/b@v1.0", "a/b", "v1.0", None, False),
        (f"hf://a/b@{COMMIT}/sub/x.pt", "a/b", COMMIT, "sub/x.pt", False),
        ("hf://a/b@refs/pr/1/x.pt", "a/b", "refs/pr/1", "x.pt", False),
        ("hf://datasets/a/b/x.parquet", "a/b", None, "x.parquet", True),
    ],
)
def test_addresses(address, repo, revision, file, dataset):
    it = of_files(address)
    assert (it.repo, it.revision, it.file, it.dataset) == (repo, revision, file, dataset)
    assert it.word == address
    assert row_at(address).patterns


@pytest.mark.parametrize(
    "address", ["hf://", "hf://a", "hf://a/b@", "hf://a/b/", "hf://a/../b/c", "hf://a/b/../../c", "hf://-a/b", "hf://a/b/a*/../c"]
)
def test_what_is_no_address(address):
    with pytest.raises(UsageError, match="is no address on the Hub"):
        row_at(address)


def test_weights_from_the_hub(server, tmp_path):
    """The file that is named, else the only one of the best kind; where there are several they are to be named."""
    given = settings(row())
    assert fetch_weights("hf://owner/name/model.bin", given, Silent()) == snapshot(tmp_path) / "model.bin"
    assert fetch_weights(f"hf://owner/name@{COMMIT}", given, Silent()) == snapshot(tmp_path) / "model.safetensors"
    assert fetch_weights("hf:/owner/name", settings(row(), offline=False), Silent()).read_bytes() == WEIGHTS
    server.repositories["models/owner/two"] = Repository({"a.safetensors": b"1" * 99, "b.safetensors": b"2" * 99})
    with pytest.raises(UsageError, match="holds 2 files of weights") as failure:
        fetch_weights("hf://owner/two", given, Silent())
    assert failure.value.hint == "name one: hf://owner/two/a.safetensors"
    server.repositories["models/owner/none"] = Repository({"config.json": CONFIG})
    with pytest.raises(MissingError, match="holds no"):
        fetch_weights("hf://owner/none", given, Silent())
    with pytest.raises(MissingError, match="--offline forbids"):
        fetch_weights("hf://owner/two/b.safetensors", settings(row(), offline=True), Silent())
