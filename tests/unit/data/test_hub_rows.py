"""Data sets of the Hub, against a stand-in for it that serves real files in miniature."""

import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants

from dmpctl.errors import MissingError, UsageError
from dmpctl.store.addresses import of_rows
from dmpctl.store.registry import published
from dmpctl.tables.columns import Columns
from dmpctl.tables.hub_rows import merged
from tests.standin import COMMIT, Answer, Repository, Standin
from tests.unit.data.hub_server import hub
from tests.unit.data.made import encoded, hub_images, hub_set, streamed_hub_images, write_parquet

NAMES = datasets.ClassLabel(names=["a", "b"])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    with hub() as standin:
        thread = threading.Thread(target=standin.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        files = standin.url + "/{repo_id}/resolve/{revision}/{filename}"
        constant = {"ENDPOINT": standin.url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_CACHE": str(tmp_path / "hub")}
        set_up(monkeypatch, offline=False, HF_ENDPOINT=standin.url, **constant)
        try:
            yield standin
        finally:
            standin.shutdown()
            thread.join()


def shards(root: Path, count: int = 2, split: str = "train", **columns: object) -> dict[str, bytes]:
    """A repository with `count` shards of five images."""
    found = {"README.md": b"---\nlicense: mit\n---\nA set.\n"}
    for part in range(count):
        images = [encoded(10 * part + row) for row in range(5)]
        path = write_parquet(root / f"{part}.parquet", images, 2, **columns)  # type: ignore[arg-type]
        found[f"data/{split}-0000{part}-of-0000{count}.parquet"] = path.read_bytes()
    return found


def set_up(monkeypatch: pytest.MonkeyPatch, offline: bool, **constant: str) -> None:
    """The Hub's libraries as they would be in a process that was started with these variables."""
    for module in (constants, datasets.config):
        for name, value in {**constant, "HF_HUB_OFFLINE": offline}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch, offline=True)


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch, offline=False, ENDPOINT="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://o/n", ("o/n", None, None, None)),
        ("hf://datasets/o/n", ("o/n", None, None, None)),
        ("hf://n", ("n", None, None, None)),
        ("hf://o/n@abc", ("o/n", "abc", None, None)),
        ("hf://o/n:test", ("o/n", None, None, "test")),
        ("hf://o/n@refs/convert/parquet:big/test", ("o/n", "refs/convert/parquet", "big", "test")),
    ],
)
def test_addresses(address, expected):
    found = of_rows(address)
    assert (found.repo, found.revision, found.config, found.split) == expected
    assert (found.dataset, hub_set(address).name) == (True, expected[0])


@pytest.mark.parametrize("address", ["hf://", "hf:///n", "hf://a/b/c", "hf://o/n:", "hf://o/n@", "hf://o/n:a/b/c", "hf://o n"])
def test_what_is_no_address(address):
    with pytest.raises(UsageError, match="is no data set's address") as caught:
        hub_set(address)
    assert "hf://owner/name@revision:config/split" in str(caught.value.hint)


def test_it_is_fetched_once_and_then_found_offline(server, tmp_path, monkeypatch, caplog, capfd):
    server.repositories["datasets/o/n"] = Repository(shards(tmp_path, label=(NAMES, [0, 1, 0, 1, 0])))
    capfd.readouterr()
    with caplog.at_level(logging.WARNING, "dmpctl"):
        source = hub_images(hub_set("hf://o/n"))
    assert caplog.messages == ["fetching hf://o/n from the Hub, 2 files"]
    assert capfd.readouterr() == ("", "")
    assert (len(source), source.num_classes, source.name) == (10, 2, "o/n")
    assert [source.item(index)[1] for index in range(10)] == [0, 1, 0, 1, 0] * 2
    bodies = [path for method, path, _ in server.asked if method == "GET" and path.endswith(".parquet")]
    assert len(bodies) == 2
    again = hub_images(hub_set("hf://o/n"))
    assert [path for method, path, _ in server.asked if method == "GET" and path.endswith(".parquet")] == bodies
    offline(monkeypatch)
    asked = len(server.asked)
    found = hub_images(hub_set("hf://o/n"))
    assert len(server.asked) == asked
    assert found.fingerprint == again.fingerprint == source.fingerprint
    assert torch.equal(found.images(), source.images())


def test_the_fingerprint_is_commit_split_and_columns_not_the_place(server, tmp_path, monkeypatch):
    two = {"kind": (NAMES, [0, 1, 0, 1, 0]), "text": (datasets.Value("string"), list("abcde"))}
    repository = Repository(shards(tmp_path, **two) | shards(tmp_path / "test", 1, "test", **two))
    server.repositories["datasets/o/n"] = repository
    found = [hub_images(hub_set(address)).fingerprint for address in ("hf://o/n", "hf://o/n:test")]
    assert hub_images(hub_set("hf://o/n:default/train")).fingerprint == found[0]
    found += [
        hub_images(hub_set("hf://o/n"), **option).fingerprint for option in ({"size": 6}, {"columns": Columns(label="text")})
    ]
    shutil.copytree(tmp_path / "hub/datasets--o--n/snapshots" / COMMIT, tmp_path / "elsewhere" / COMMIT)
    moved = hub_images(replace(hub_set("hf://o/n"), folder=tmp_path / "elsewhere" / COMMIT))
    assert moved.fingerprint == found[0]
    repository.commit = "d" * 40
    found.append(hub_images(hub_set("hf://o/n")).fingerprint)
    assert len(set(found)) == 5


def test_a_split_or_configuration_that_is_not_there(server, tmp_path):
    server.repositories["datasets/o/n"] = Repository(shards(tmp_path))
    with pytest.raises(UsageError, match="hf://o/n:valid has no split 'valid'") as caught:
        hub_images(hub_set("hf://o/n:valid"))
    assert "train" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"hf://o/n:big/train cannot be opened: .*'big' not found"):
        hub_images(hub_set("hf://o/n:big/train"))


@pytest.mark.parametrize("word", ["ffhq", "imagenet", "laion-art", "laion-subset"])
def test_a_repository_that_is_gone_says_what_to_take_instead(server, word):
    with pytest.raises(MissingError, match=f"there is no {hub_set(word).at.page}, or it is private") as caught:
        hub_images(hub_set(word))
    assert caught.value.exit_code == 3
    assert "--data" in str(caught.value.hint)


def test_a_gated_repository_says_where_to_accept(server, tmp_path):
    server.repositories["datasets/ILSVRC/imagenet-1k"] = Repository(shards(tmp_path), gated=True)
    for call in (hub_images, streamed_hub_images):
        with pytest.raises(MissingError, match=r"imagenet .* is gated") as caught:
            call(hub_set("imagenet"))
        assert "https://huggingface.co/datasets/ILSVRC/imagenet-1k" in str(caught.value.hint)
        assert "sub-folder for each synset" in str(caught.value.hint)


def test_offline_and_not_there_names_the_command(server, monkeypatch):
    offline(monkeypatch)
    with pytest.raises(MissingError, match=r"ffhq .* is not in the cache") as caught:
        hub_images(hub_set("ffhq"))
    assert "dmpctl download ffhq" in str(caught.value.hint)
    with pytest.raises(MissingError, match="cannot be streamed offline"):
        streamed_hub_images(hub_set("ffhq"))
    assert server.asked == []


def test_out_of_reach_and_out_of_order(server, tmp_path, monkeypatch):
    server.repositories["datasets/o/n"] = Repository(shards(tmp_path))
    with pytest.raises(MissingError, match="o/n has no revision abc"):
        hub_images(hub_set("hf://o/n@abc"))
    server.always["/api/datasets/o/n"] = Answer(status=403)
    with pytest.raises(MissingError, match=r"datasets/o/n refuses access \(HTTP 403\)"):
        hub_images(hub_set("hf://o/n"))
    unreachable(monkeypatch)
    for call in (hub_images, streamed_hub_images):
        with pytest.raises(MissingError, match=r"hf://o/n cannot be fetched|is not reached"):
            call(hub_set("hf://o/n"))


def test_where_the_hub_is_not_reached_the_cache_is_enough(server, tmp_path, monkeypatch, caplog):
    server.repositories["datasets/o/n"] = Repository(shards(tmp_path))
    before = hub_images(hub_set("hf://o/n"))
    unreachable(monkeypatch)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dmpctl"):
        assert hub_images(hub_set("hf://o/n")).fingerprint == before.fingerprint
    assert caplog.messages == ["the Hub is not reached: looking for hf://o/n in its cache"]


def test_only_the_files_of_a_known_split_are_fetched(server, tmp_path):
    files = shards(tmp_path, label=(NAMES, [0, 1, 0, 1, 0])) | {"data/test-00000-of-00001.parquet": b"never asked for"}
    server.repositories["datasets/ILSVRC/imagenet-1k"] = Repository(files)
    source = hub_images(hub_set("imagenet"))
    assert (len(source), source.num_classes, source.name) == (10, 2, "imagenet")
    assert not any("data/test" in path for _, path, _ in server.asked)


def test_known_columns_give_way_to_those_asked_for():
    assert merged(Columns(), published()["laion-art"]) == Columns("image", None, "text")
    assert merged(Columns(caption="alt"), published()["laion-art"]) == Columns("image", None, "alt")


def test_streaming_fetches_row_groups_and_keeps_nothing(server, tmp_path):
    server.repositories["datasets/o/n"] = Repository(shards(tmp_path, label=(NAMES, [0, 1, 0, 1, 0])))
    source, other = streamed_hub_images(hub_set("hf://o/n")), hub_images(hub_set("hf://o/n"))
    shutil.rmtree(tmp_path / "hub")
    assert source.fingerprint == other.fingerprint
    assert len(source) == len(other) == 10
    for index in (0, 3, 9):
        assert torch.equal(source.item(index)[0], other.item(index)[0])
        assert source.item(index)[1] == other.item(index)[1]
    assert not (tmp_path / "hub").exists()


def test_only_parquet_is_streamed(server, tmp_path):
    server.repositories["datasets/o/n"] = Repository({"README.md": b"", "train/a/1.png": encoded(0), "train/b/1.png": encoded(1)})
    with pytest.raises(UsageError, match="is not parquet") as caught:
        streamed_hub_images(hub_set("hf://o/n"))
    assert "hf://o/n@refs/convert/parquet" in str(caught.value.hint)


def test_a_connection_that_is_lost_in_the_middle(server, tmp_path):
    server.repositories["datasets/o/n"] = Repository(shards(tmp_path))
    source = streamed_hub_images(hub_set("hf://o/n"))
    source._rows._held.clear()
    for part in range(2):
        path = f"/datasets/o/n/resolve/{COMMIT}/data/train-0000{part}-of-00002.parquet"
        server.always[path] = Answer(status=403)
    with pytest.raises(MissingError, match="cannot be read") as caught:
        source.item(9)
    assert "goes on where it stopped" in str(caught.value.hint)
