"""From the line to the settings, and from the settings to the engine."""

import json
import os
from pathlib import Path

import pytest

from dmpctl.settings.options import options_of
from dmpctl.types import Report


def config(dmpctl_, *argv: str) -> dict[str, dict[str, object]]:
    code, out, err = dmpctl_(*argv, "--print-config", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_only_what_was_typed_is_given(dmpctl_, monkeypatch):
    monkeypatch.setenv("DMPCTL_BATCH_SIZE", "7")
    found = config(dmpctl_, "patch", "--iters", "5", "--no-hflip")
    assert found["iters"] == {"value": 5, "origin": "--iters"}
    assert found["batch_size"] == {"value": 7, "origin": "DMPCTL_BATCH_SIZE"}
    assert found["hflip"] == {"value": False, "origin": "--no-hflip"}
    assert found["beta1"] == {"value": 0.9, "origin": "default"}


def test_typing_the_default_is_typing_it(dmpctl_):
    assert config(dmpctl_, "patch", "--iters", "50000")["iters"] == {"value": 50_000, "origin": "--iters"}


@pytest.mark.parametrize(
    "line",
    [
        ("patch",),
        ("pretrain",),
        ("sample", "r"),
        ("fid", "r"),
        ("inspect-gates", "r"),
        ("import", "f"),
        ("export", "r"),
        ("doctor",),
        ("download",),
    ],
)
def test_print_config_shows_every_option(dmpctl_, line):
    found = config(dmpctl_, *line)
    assert list(found) == [option.public for option in options_of(line[0]).values()]


def test_print_config_for_people(dmpctl_):
    code, out, _ = dmpctl_("patch", "--print-config", "--topk", "3", "--gate", "topk")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["topk", "3", "--topk"] in rows
    assert ["prompts", "-", "default"] in rows


def test_config_file_and_its_origin(dmpctl_, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("iters = 3\n")
    assert config(dmpctl_, "patch", "--config", str(path))["iters"] == {"value": 3, "origin": f"{path}: iters"}


def test_values_reach_the_engine_with_their_types(dmpctl_, engine):
    seen = []

    def patch(settings, progress):
        seen.append(settings)
        return Report({"done": 1}, ({"a": "b"},), ("a sentence",))

    engine("training.patch", "patch", patch)
    line = (
        "patch",
        "--run",
        "some/where",
        "--gate",
        "topk",
        "--topk",
        "3",
        "--channels",
        "1",
        "--prompt-lr",
        "1e-2",
        "--no-evaluate",
    )
    code, out, _ = dmpctl_(*line)
    assert code == 0
    assert "a sentence" in out
    settings = seen[0]
    assert (settings.run.run, settings.method.topk, settings.data.channels) == (Path("some/where"), 3, 1)
    assert (settings.method.prompt_lr, settings.evaluate.evaluate, settings.console.dry_run) == (0.01, False, False)


@pytest.mark.parametrize(
    ("line", "module", "function", "argument"),
    [
        (("pretrain",), "training.pretrain", "pretrain", None),
        (("patch",), "training.patch", "patch", None),
        (("sample", "r"), "sampling.generate", "sample", Path("r")),
        (("fid", "r"), "measuring.evaluate", "fid", "r"),
        (("inspect-gates", "r"), "gates.inspect", "inspect", Path("r")),
        (("import", "f"), "exchange.importer", "import_file", Path("f")),
        (("export", "r"), "exchange.export", "export", Path("r")),
        (("download", "a", "b"), "store.download", "download", ["a", "b"]),
        (("download",), "store.download", "download", []),
    ],
)
def test_each_command_calls_its_engine(dmpctl_, engine, line, module, function, argument):
    seen = []

    def body(settings, *rest):
        seen.append(rest[:-1])
        rest[-1].say("talk")
        return Report({"answer": 42})

    engine(module, function, body)
    code, out, err = dmpctl_(*line, "--json", "--dry-run")
    assert (code, json.loads(out), err) == (0, {"answer": 42}, "talk\n")
    assert seen == [(argument,) if argument is not None else ()]


def test_offline_is_set_before_the_engine_is_imported(dmpctl_, engine):
    seen = {}
    engine("store.download", "download", lambda *_: seen.update(os.environ) or Report({}))
    assert dmpctl_("download", "--offline")[0] == 0
    assert (seen["HF_HUB_OFFLINE"], seen["HF_DATASETS_OFFLINE"]) == ("1", "1")


def test_a_named_cache_is_the_cache_of_the_hub_library_too(dmpctl_, engine, tmp_path, monkeypatch):
    seen = {}
    engine("store.download", "download", lambda *_: seen.update(os.environ) or Report({}))
    monkeypatch.chdir(tmp_path)
    assert dmpctl_("download", "--cache-dir", "here")[0] == 0
    assert (seen["DMPCTL_CACHE_DIR"], seen["HF_HUB_CACHE"]) == (str(tmp_path / "here"), str(tmp_path / "here" / "hub"))


def test_online_sets_nothing(dmpctl_, engine):
    seen = {}
    engine("store.download", "download", lambda *_: seen.update(os.environ) or Report({}))
    dmpctl_("download")
    assert not {"HF_HUB_OFFLINE", "HF_HUB_CACHE", "DMPCTL_CACHE_DIR"} & set(seen)


def test_print_config_calls_no_engine(dmpctl_, engine):
    def body(*_):
        raise AssertionError

    engine("training.patch", "patch", body)
    assert dmpctl_("patch", "--print-config")[0] == 0
