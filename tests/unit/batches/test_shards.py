"""Shards on disk: what counts as there, what damage is found when, and who may write."""

import json
import multiprocessing
import os
import resource
import shutil

import pytest
import torch

from dmpctl.batches.shards import Claims, Rows, Shards, per_shard_of
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.files import sha256_of
from tests.helpers import flip, largest_file

COUNT, PER = 10, 4


def shards_in(root, **key):
    return Shards(root, "things", {"of": "tests", **key}, COUNT, PER, {"by": "hand"})


def rows(items):
    return {"row": torch.tensor(list(items)).half()[:, None].repeat(1, 5), "label": torch.tensor(list(items))}


@pytest.fixture
def full(tmp_path):
    made = shards_in(tmp_path)
    made.folder.mkdir(parents=True)
    for shard in range(len(made)):
        made.write(shard, rows(made.items(shard)))
    return made


def keep_time(path, change):
    """Change a file behind the back of its time of change, as a failing disk would."""
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_last_shard_holds_what_is_left(full):
    assert len(full) == 3
    assert [list(full.items(shard)) for shard in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [len(part["row"]) for part in full.tensors()] == [4, 4, 2]
    assert torch.cat([part["label"] for part in full.tensors()]).tolist() == list(range(10))


def test_rows_of_many_shards_are_read_as_one(full):
    found = Rows([part["row"] for part in full.tensors()], PER).gather(torch.tensor([9, 0, 4, 0, 7]))
    assert found.dtype == torch.float16
    assert found[:, 0].tolist() == [9, 0, 4, 0, 7]


def test_what_is_mapped_is_not_read(tmp_path):
    """A sparse file of 2 GiB: opened, and one row read, without its memory."""
    items, item = 2**11, 2**20
    big = Shards(tmp_path, "things", {}, items, items, {})
    big.folder.mkdir(parents=True)
    about = {"dtype": "U8", "shape": [items, item], "data_offsets": [0, items * item]}
    header = json.dumps({"__metadata__": {"key": big.digest, "shard": "0"}, "row": about}).encode()
    header += b" " * (-len(header) % 8)
    big.path(0).write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(big.path(0), 8 + len(header) + items * item)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert Rows([big._mapped(0)["row"]], items).gather(torch.tensor([2_000])).shape == (1, item)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize(("item_bytes", "expected"), [(1, 4096), (32 * 2**10, 2048), (128 * 2**10, 512), (2**30, 1)])
def test_a_shard_is_neither_too_long_nor_too_large(item_bytes, expected):
    assert per_shard_of(item_bytes) == expected


def test_nothing_is_there_at_first_and_nothing_is_made(tmp_path):
    assert shards_in(tmp_path).finished() == set()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IntegrityError, match=r"lacks shard-00000\.safetensors \(3 of 3 shards\)"):
        shards_in(tmp_path).tensors()


def test_another_key_is_another_folder(full, tmp_path):
    other = shards_in(tmp_path, size=3)
    assert other.folder != full.folder
    assert other.finished() == set()
    assert Shards(tmp_path, "others", {"of": "tests"}, COUNT, PER, {}).folder != full.folder
    assert Shards(tmp_path, "things", {"of": "tests"}, COUNT, PER + 1, {}).folder != full.folder
    assert Shards(tmp_path, "things", {"of": "tests"}, COUNT, PER, {"by": "another"}).finished() == {0, 1, 2}


def test_a_folder_with_anothers_manifest_is_refused(full, tmp_path):
    other = shards_in(tmp_path, size=3)
    shutil.copytree(full.folder, other.folder)
    with pytest.raises(IntegrityError, match="something else than its name says"):
        other.finished()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"shards": 3}', b'{"shards": {"0": {}}}', b'{"shards": {"a": []}}'])
def test_a_damaged_manifest_counts_for_nothing(full, text):
    (full.folder / "manifest.json").write_bytes(text)
    assert full.finished() == set()
    full.write(1, rows(full.items(1)))
    assert full.finished() == {1}


@pytest.mark.parametrize("change", [os.unlink, lambda path: os.truncate(path, 100)])
def test_a_shard_that_is_gone_or_short_is_missing_at_once(full, change):
    keep_time(full.path(1), change) if change is not os.unlink else change(full.path(1))
    assert full.finished() == {0, 2}
    with pytest.raises(IntegrityError, match=r"lacks shard-00001\.safetensors \(1 of 3 shards\)"):
        full.tensors()


def test_a_changed_byte_is_found_whatever_its_time_says(full, tmp_path):
    keep_time(full.path(0), flip)
    again = shards_in(tmp_path)
    assert again.finished() == {1, 2}
    assert again.damaged == {"shard-00000.safetensors"}
    flip(full.path(2))
    os.utime(full.path(2), ns=(1, 1))
    assert full.finished() == {1}  # looked at before: what was touched is looked at again
    full.write(2, rows(full.items(2)))
    assert shards_in(tmp_path).finished() == {1, 2}


def test_shards_are_hashed_once(full, tmp_path, monkeypatch):
    hashed, again = [], shards_in(tmp_path)
    monkeypatch.setattr("dmpctl.batches.shards.sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    for _ in range(3):
        assert again.finished() == {0, 1, 2}
    assert sorted(hashed) == [full.path(shard) for shard in range(3)]


def test_a_cache_that_can_only_be_read_can_be_read(full, monkeypatch):
    os.utime(full.path(0), ns=(5, 5))

    def refuse(*args):
        raise UsageError("read-only")

    monkeypatch.setattr("dmpctl.batches.shards.write_json", refuse)
    assert full.finished() == {0, 1, 2}


def test_a_shard_under_anothers_name_is_refused(full):
    shutil.copy(full.path(0), full.path(1))
    entry = full._entries()[0]
    full._record({1: entry}, {})
    assert full.finished() == {0, 1, 2}
    with pytest.raises(IntegrityError, match="another shard than its name says"):
        full.tensors()


def test_what_was_made_anew_meanwhile_is_not_forgotten(full):
    old = full._entries()[1]
    full._record({1: old.model_copy(update={"sha256": "new"})}, {})
    full._record({}, {1: old})
    assert 1 in full._entries()


def test_leftovers_of_killed_processes_are_taken_away(full):
    left = [full.folder / name for name in (".shard-00001.safetensors.99999", ".manifest.json.99999")]
    other = full.folder / ".shard-00002.safetensors.99999"  # of a process that may live
    for path in (*left, other):
        path.write_bytes(b"half")
    full.write(1, rows(full.items(1)))
    assert [path.exists() for path in (*left, other)] == [False, False, True]


def test_a_manifest_says_what_it_is_for_people_too(full):
    manifest = json.loads((full.folder / "manifest.json").read_text())
    assert manifest["key"] == {"schema_version": 1, "kind": "things", "of": "tests", "count": 10, "per_shard": 4}
    assert manifest["about"] == {"by": "hand"}
    assert set(manifest["shards"]) == {"0", "1", "2"}


def test_equal_content_is_equal_bytes(full, tmp_path):
    again = shards_in(tmp_path / "again")
    again.folder.mkdir(parents=True)
    again.write(0, rows(again.items(0)))
    assert again.path(0).read_bytes() == full.path(0).read_bytes()


def hold(shards, ready, end):
    with Claims(shards) as claims:
        assert claims.take(1)
        ready.set()
        end.wait(30)
        os._exit(0)  # as one that was killed: nothing is given back


def test_a_claim_keeps_others_out_until_its_process_ends(full):
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(full, ready, end))
    other.start()
    assert ready.wait(30)
    with Claims(full) as claims:
        assert claims.take(0)
        assert not claims.take(1)
        end.set()
        other.join(30)
        assert claims.take(1)
        claims.give_back(1)
        assert claims.take(1)


def test_a_full_disk_while_writing_is_a_usage_error(full):
    with largest_file(100), pytest.raises(UsageError, match="File too large"):
        full.write(1, rows(full.items(1)))
