"""`dmpctl download` as a whole: names, licences, the cache and its index, against a server on this machine."""

import hashlib
import json
import os

import pytest

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.settings.assets import AssetRow, Assets
from dmpctl.store import download as download_command
from dmpctl.store.cache import read_index, working_on
from dmpctl.store.fetch import cached, require
from dmpctl.store.locate import fetch_weights
from dmpctl.store.registry import shipped
from dmpctl.types import Silent
from tests.helpers import files, flip, settings_for
from tests.standin import Answer, running
from tests.unit.store.test_https import Talk

CONTENT = bytes(range(256)) * 300
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = "files/thing/good.bin"
LOCKS = {"locks/.index.lock", "locks/thing.lock"}


@pytest.fixture
def server():
    with running() as standin:
        standin.files["/good.bin"] = CONTENT
        yield standin


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def given(server, cache):
    """Settings of `dmpctl download` with rows of their own; the first is `thing`, with these values."""

    def settings(*more: AssetRow, thing=None, **options):
        row = AssetRow(**{"name": "thing", "url": f"{server.url}/good.bin", "licence": "MIT"} | (thing or {}))
        return settings_for("download", **options).model_copy(update={"assets": Assets(rows=(row, *more))})

    return settings


def download(settings, *names, talk=None):
    return download_command.download(settings, names, talk or Silent())


def test_what_was_fetched_is_recorded_and_not_fetched_again(given, server, cache):
    report = download(given(), "thing")
    [found] = report.data["files"]
    assert found | {"fetched": ""} == {
        "name": "thing",
        "source": f"{server.url}/good.bin",
        "licence": "MIT",
        "non_commercial": False,
        "accepted": None,
        "revision": None,
        "sha256": DIGEST,
        "fetched": "",
        "path": str(cache / NAME),
    }
    assert files(cache) == {NAME, "index.json", *LOCKS}
    assert download(given(), "thing").data == report.data
    assert cached("thing", given()) == require("thing", given()) == cache / NAME
    assert len(server.asked) == 1


def test_a_hash_that_was_not_known_is_the_one_of_the_first_download(given, server, cache):
    download(given(), "thing")
    (cache / NAME).unlink()
    server.files["/good.bin"] = CONTENT + b"changed"
    with pytest.raises(IntegrityError, match=f"expected {DIGEST}") as failure:
        download(given(), "thing")
    assert "a row of your own" in failure.value.hint
    server.files["/good.bin"] = CONTENT
    download(given(), "thing")


def test_one_flipped_bit_is_found(given, cache):
    download(given(), "thing")
    flip(cache / NAME, 1000)
    for use in (
        lambda: download(given(), "thing"),
        lambda: download(given(verify=True)),
        lambda: download(given(verify=True), "thing"),
        lambda: require("thing", given()),
    ):
        with pytest.raises(
            IntegrityError, match=rf"good\.bin is damaged: it has sha256 [0-9a-f]{{64}}, expected {DIGEST}"
        ) as bad:
            use()
        assert bad.value.exit_code == 4
        assert bad.value.hint == "delete it and run dmpctl download thing"


def test_data_is_checked_by_size_and_when_asked_by_hash(given, cache):
    row = {"kind": "data"}
    download(given(thing=row), "thing")
    flip(cache / NAME)
    assert require("thing", given(thing=row)) == cache / NAME
    with pytest.raises(IntegrityError, match="is damaged"):
        download(given(thing=row, verify=True))
    (cache / NAME).write_bytes(b"short")
    with pytest.raises(IntegrityError, match="5 bytes, expected 76800 bytes"):
        require("thing", given(thing=row))


def test_verify_names_every_file_and_counts_the_bad(given, server, cache):
    other = AssetRow(name="other", url=f"{server.url}/good.bin")
    assert download(given(verify=True)).lines == ("nothing was downloaded yet",)
    download(given(other), "thing", "other")
    report = download(given(other, verify=True))
    assert {row["file"]: row["sha256"] for row in report.data["verified"]} == {
        "thing/good.bin": DIGEST,
        "other/good.bin": DIGEST,
    }
    flip(cache / NAME)
    flip(cache / "files/other/good.bin")
    with pytest.raises(IntegrityError, match="and 1 more are not as they should be"):
        download(given(other, verify=True))
    (cache / NAME).unlink()
    (cache / "files/other/good.bin").unlink()
    with pytest.raises(MissingError, match="is not there, and 1 more"):
        download(given(other, verify=True))


def test_a_file_put_there_by_hand_is_as_good(given, server, cache):
    row = {"sha256": DIGEST, "size": len(CONTENT)}
    (cache / "files/thing").mkdir(parents=True)
    (cache / NAME).write_bytes(CONTENT)
    assert cached("thing", given(thing=row)) == cache / NAME
    assert download(given(thing=row, offline=True), "thing").data["files"][0]["sha256"] == DIGEST
    assert read_index().entries["thing"].fetched
    assert server.asked == []
    (cache / NAME).write_bytes(CONTENT[:-1])
    assert cached("thing", given(thing=row)) is None


def test_what_only_comes_by_hand_says_where_it_goes(given, cache):
    with pytest.raises(MissingError, match=r"fid_stats_mscoco256_val.npz has no address") as failure:
        download(given(), "fid-stats-coco")
    assert str(cache / "files/fid-stats-coco/fid_stats_mscoco256_val.npz") in failure.value.hint


def test_another_address_is_another_file(given, server, cache):
    download(given(), "thing")
    server.files["/new/good.bin"] = b"new"
    row = {"url": f"{server.url}/new/good.bin"}
    assert cached("thing", given(thing=row)) is None
    download(given(thing=row), "thing")
    assert (cache / NAME).read_bytes() == b"new"


def test_require_names_the_command(given):
    with pytest.raises(MissingError, match=r"thing is not in the cache") as failure:
        require("thing", given(thing={"non_commercial": True, "licence": "NC"}))
    assert (failure.value.exit_code, failure.value.hint) == (3, "run dmpctl download thing --accept-license")


# Licences


def test_a_licence_that_forbids_commercial_use_is_to_be_accepted(given, server, cache):
    row = {"licence": "CC-BY-NC-4.0", "non_commercial": True}
    with pytest.raises(UsageError, match=r"for non-commercial use only: thing \(CC-BY-NC-4.0\)") as failure:
        download(given(thing=row), "thing")
    assert failure.value.exit_code == 2
    assert failure.value.hint == "if you accept that: dmpctl download thing --accept-license"
    assert (server.asked, cache.exists()) == ([], False)
    [found] = download(given(thing=row, accept_license=True), "thing").data["files"]
    assert found["accepted"] == read_index().licences["thing"].accepted
    download(given(thing=row), "thing")  # accepted once is accepted
    with pytest.raises(UsageError, match="stricter"):
        download(given(thing=row | {"licence": "stricter"}), "thing")
    [again] = download(given(thing=row | {"licence": "stricter", "non_commercial": False}), "thing").data["files"]
    assert again["accepted"] is None


def test_the_licence_of_the_whole_holds_for_its_parts(given, cache):
    whole = AssetRow(name="whole", parts=("thing",), licence="NC", non_commercial=True)
    with pytest.raises(UsageError, match=r"whole \(NC\)"):
        download(given(whole), "whole")
    download(given(whole, accept_license=True), "whole")
    assert cached("whole", given(whole)) == cache / "files"
    assert set(read_index().licences) == {"whole"}


# Offline, dry run, lists


def test_offline_opens_no_connection(given, server, cache, no_connection):
    no_connection()
    with pytest.raises(MissingError, match="not in the cache: thing, vae-ema, and --offline forbids") as failure:
        download(given(offline=True), "thing", "vae-ema")
    assert (failure.value.exit_code, failure.value.hint) == (3, "online: dmpctl download thing vae-ema")
    with pytest.raises(MissingError, match="--offline forbids"):
        fetch_weights("https://example.org/x.pt", given(offline=True), Silent())
    assert not cache.exists()


def test_a_dry_run_fetches_nothing(given, server, cache):
    talk = Talk()
    report = download(given(dry_run=True, accept_license=True), "thing", "dit-xl2-256", talk=talk)
    assert report.data == {"files": [], "would_fetch": ["thing", "dit-xl2-256"]}
    assert f"would fetch thing from {server.url}/good.bin (unknown size)" in talk.said
    assert (server.asked, cache.exists()) == ([], False)


def test_the_disk_is_looked_at_for_all_at_once(given, cache):
    big = AssetRow(name="big", url="https://example.org/x", size=10**18)
    with pytest.raises(UsageError, match=r"thing, big needs 1e\+06 TB"):
        download(given(big), "thing", "big")
    assert not cache.exists()


@pytest.mark.parametrize("options", [{}, {"list_assets": True}])
def test_the_list(given, options, cache):
    download(given(), "thing")
    talk = Talk()
    own = AssetRow(name="inception", url="https://example.org/i.pth")
    report = download(given(own, **options), talk=talk)
    rows = {row["name"]: row for row in report.data["assets"]}
    assert set(rows) == {"thing", *shipped()}
    assert {name for name, row in rows.items() if row["present"] == "yes"} == {"thing"}
    assert {name for name, row in rows.items() if row["own"]} == {"thing", "inception"}
    assert rows["vae-mse"]["size"] == "335 MB"
    assert rows["imagenet"]["licence"].endswith("(non-commercial)")
    assert "FID 2.27" in rows["dit-xl2-256"]["score"]
    assert list(report.table[0]) == ["name", "what", "size", "licence", "present"]
    assert talk.said == ["inception: the row of your settings takes the place of the shipped one"]
    json.dumps(report.data)


def test_a_list_of_some(given):
    report = download(given(list_assets=True), "coco", "thing")
    assert [row["name"] for row in report.data["assets"]] == ["coco", "thing"]


def test_unknown_names(given):
    with pytest.raises(UsageError, match="incption is no known download"):
        download(given(), "incption")


# What an experiment needs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base = 'dit-xl2-256'\ndata = 'ffhq'", {"dit-xl2-256", "vae-ema", "ffhq", "inception"}),
        ("base = 'dit-xl2-256'\ndata = 'ffhq'\ncodec = 'vae-mse'", {"dit-xl2-256", "vae-mse", "ffhq", "inception"}),
        ("base = 'dit-xl2-256'\nevaluate = false", {"dit-xl2-256", "vae-ema"}),
        ("data = 'coco'", {"coco-train2014", "coco-val2014", "coco-annotations", "inception"}),
        ("[fid]\nreference = 'adm-imagenet-256'", {"adm-imagenet-256", "inception"}),
        ("[fid]\nreference = 'adm-imagenet-256'\nextractor = 'pixels'", {"adm-imagenet-256"}),
        ("[pretrain]\ndata = 'ffhq'\n[fid]\nextractor = 'inception'", {"ffhq", "inception"}),
        ("run = 'ffhq'\n[patch]\nbase = 'mine'\n[assets.mine]\nurl = 'https://example.org/m.pt'", {"mine", "inception"}),
        ("iters = 5", set()),
    ],
)
def test_what_a_settings_file_needs(given, tmp_path, text, expected):
    path = tmp_path / "experiment.toml"
    path.write_text(text)
    report = download(given(needed_for=str(path), dry_run=True, accept_license=True))
    assert set(report.data.get("would_fetch", [])) == expected
    if not expected:
        assert report.lines == (f"{path} needs nothing that has to be fetched",)


def test_addresses_that_an_experiment_names(given, tmp_path):
    path = tmp_path / "experiment.toml"
    path.write_text("base = 'DiT-L/2'\ndata = 'hf://owner/name@abc:config/train'\nevaluate = false\n")
    request = download_command.requested(given(needed_for=str(path)), [])
    assert [row.source for row in request.wanted] == ["hf://stabilityai/sd-vae-ft-ema@main", "hf://datasets/owner/name@abc"]
    path.write_text("base = 'DiT-L/2'\ncodec = 'vae-mse'\ndata = 'hf://owner/name:test'\nstreaming = true\nevaluate = false\n")
    assert [row.name for row in download_command.requested(given(needed_for=str(path)), []).wanted] == ["vae-mse"]
    request = download_command.requested(given(), ["hf://owner/name@abc/x.pt", "https://example.org/x.pt"])
    assert [row.source for row in request.wanted] == ["hf://owner/name@abc", "https://example.org/x.pt"]


def test_what_a_run_needs(given, cache, tmp_path, server):
    row = AssetRow(name="mine", url=f"{server.url}/good.bin").model_dump(mode="json")
    settings = {"base": {"base": "mine"}, "evaluate": {"evaluate": False}, "assets": {"rows": [row]}}
    config = {"schema_version": 1, "command": "patch", "science": {}, "settings": settings}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for place in (tmp_path / "run", tmp_path / "run" / "config.json"):
        assert [row["name"] for row in download(given(needed_for=str(place))).data["files"]] == ["mine"]
    assert (cache / "files/mine/good.bin").is_file()
    settings["assets"]["rows"][0]["nothing"] = 1
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match=r"recorded settings do not fit this dmpctl: assets\.rows\.0\.nothing"):
        download(given(needed_for=str(tmp_path / "run")))


def test_an_experiment_that_is_not_there_or_needs_a_licence(given, tmp_path):
    with pytest.raises(MissingError, match="is not there"):
        download(given(needed_for=str(tmp_path / "no.toml")))
    with pytest.raises(MissingError, match="is no run"):
        download(given(needed_for=str(tmp_path)))
    (tmp_path / "x.toml").write_text("base = 'dit-xl2-256'\n")
    with pytest.raises(UsageError, match="dit-xl2-256") as failure:
        download(given(needed_for=str(tmp_path / "x.toml")))
    assert failure.value.hint == f"if you accept that: dmpctl download --for {tmp_path / 'x.toml'} --accept-license"


# Pruning


def test_prune_removes_what_no_row_names(given, server, cache):
    other = AssetRow(name="other", url=f"{server.url}/good.bin")
    download(given(other), "thing", "other")
    (cache / "files/thing/good.bin.part").write_bytes(b"half")
    (cache / "files/thing/good.bin.part.json").write_text("{}")
    (cache / "hub/models--a--b/blobs").mkdir(parents=True)
    (cache / "hub/models--a--b/blobs/x").write_bytes(b"12345")
    (cache / "hub/models--stabilityai--sd-vae-ft-ema/blobs").mkdir(parents=True)
    (cache / "hub/models--stabilityai--sd-vae-ft-ema/blobs/x.incomplete").write_bytes(b"123")
    (cache / "hub/models--stabilityai--sd-vae-ft-ema/blobs/y").write_bytes(b"whole")
    (cache / "latents").mkdir()
    (cache / "latents/x").write_text("not ours to prune")
    before = files(cache)
    planned = download(given(prune=True, dry_run=True))
    assert files(cache) == before
    assert planned.lines[0] == f"would free 76.8 kB in {cache}"
    done = download(given(prune=True))
    assert done.data["bytes"] == planned.data["bytes"] == len(CONTENT) + 4 + 2 + 5 + 3
    kept = {NAME, "index.json", "latents/x", "hub/models--stabilityai--sd-vae-ft-ema/blobs/y"}
    assert {name for name in files(cache) if not name.startswith("locks/")} == kept
    assert set(read_index().entries) == {"thing"}
    assert download(given(prune=True)).data["removed"] == []
    with pytest.raises(UsageError, match="takes no names"):
        download(given(prune=True), "thing")


def test_prune_leaves_what_is_being_fetched(given, cache):
    (cache / "files/thing").mkdir(parents=True)
    (cache / "files/thing/good.bin.part").write_bytes(b"half")
    with working_on("thing"):
        assert download(given(prune=True)).data["removed"] == []
    assert (cache / "files/thing/good.bin.part").exists()


# Places


def test_a_cache_that_cannot_be_written(given, cache):
    cache.write_text("a file")
    with pytest.raises(UsageError, match="cannot write to"):
        download(given(), "thing")


def test_a_cache_that_may_only_be_read_is_used(given, cache, monkeypatch):
    row = {"sha256": DIGEST}
    (cache / "files/thing").mkdir(parents=True)
    (cache / NAME).write_bytes(CONTENT)
    (cache / "locks").write_text("no folder: nothing can be locked here")
    assert require("thing", given(thing=row)) == cache / NAME
    assert download(given(thing=row), "thing").data["files"][0]["path"] == str(cache / NAME)


@pytest.mark.parametrize("text", ["{", '{"schema_version": 1}', '{"schema_version": 1, "entries": {"a": 3}, "licences": {}}'])
def test_a_damaged_index(given, cache, text):
    cache.mkdir()
    (cache / "index.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"index\.json"):
        download(given(), "thing")


# --weights


def test_weights_by_address_name_and_path(given, server, cache, tmp_path):
    settings = given()
    found = fetch_weights(f"{server.url}/good.bin", settings, Silent())
    assert found.read_bytes() == CONTENT
    assert found.parent.name.startswith("url-")
    collapsed = f"{server.url}/good.bin".replace("//", "/")  # what a Path makes of it
    assert fetch_weights(collapsed, settings, Silent()) == found
    assert len(server.asked) == 1
    flip(found)
    with pytest.raises(IntegrityError, match="is damaged"):
        fetch_weights(f"{server.url}/good.bin", settings, Silent())
    download(settings, "thing")
    assert fetch_weights("thing", settings, Silent()) == cache / NAME
    (tmp_path / "x.pt").write_bytes(b"x")
    assert fetch_weights(tmp_path / "x.pt", settings, Silent()) == tmp_path / "x.pt"
    with pytest.raises(MissingError, match="is not there"):
        fetch_weights(tmp_path / "no.pt", settings, Silent())
    with pytest.raises(UsageError, match="is no https address"):
        fetch_weights("http://example.org/x.pt", settings, Silent())


def test_a_server_in_trouble_leaves_the_index_alone(given, server, cache):
    server.always["/good.bin"] = Answer(503)
    with pytest.raises(MissingError, match="HTTP 503"):
        download(given(), "thing")
    assert read_index().entries == {}
    assert "DMPCTL_CACHE_DIR" in os.environ
