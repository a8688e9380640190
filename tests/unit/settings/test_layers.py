"""Flags > DMPCTL_* > file > run > preset > defaults; and every wrong value names where it came from."""

import json
from pathlib import Path

import pytest

from dmpctl.errors import MissingError, UsageError
from dmpctl.settings.layers import resolve
from dmpctl.settings.presets import PRESETS


@pytest.fixture
def toml(tmp_path):
    def write(text: str, name: str = "x.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def sentence(*args, kind=UsageError, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        resolve(*args, **kwargs)
    assert "\n" not in caught.value.message
    return caught.value.message


def spoken(*args) -> str:
    """Sentence and hint."""
    with pytest.raises(UsageError) as caught:
        resolve(*args)
    return f"{caught.value.message} ({caught.value.hint})"


def test_precedence_of_all_layers(monkeypatch, toml):
    def value(given, config=None):
        resolved = resolve("patch", {"base": "DiT-L/2"} | given, config)
        return resolved.settings.train.iters, resolved.origins["iters"]

    assert value({}) == (50_000, "default")
    assert value({"preset": "digits"}) == (PRESETS["digits"].values["iters"], "preset digits")
    shared = toml("iters = 3\n")
    assert value({"preset": "digits"}, shared) == (3, f"{shared}: iters")
    table = toml("iters = 3\n[patch]\niters = 4\n[pretrain]\niters = 5\n", "y.toml")
    assert value({"preset": "digits"}, table) == (4, f"{table} [patch]: iters")
    monkeypatch.setenv("DMPCTL_ITERS", "6")
    assert value({"preset": "digits"}, table) == (6, "DMPCTL_ITERS")
    assert value({"preset": "digits", "iters": "7"}, table) == (7, "--iters")


def test_auto_preset_fills_what_the_bundled_backbone_needs():
    resolved = resolve("patch", {"batch_size": "5"})
    assert (resolved.settings.train.batch_size, resolved.origins["batch_size"]) == (5, "--batch-size")
    assert resolved.origins["iters"] == "preset digits"
    assert resolve("patch", {"base": "DiT-L/2"}).origins["iters"] == "default"


def test_a_preset_and_a_base_may_come_from_the_file(toml):
    resolved = resolve("patch", {}, toml('preset = "dmp-code"\nbase = "DiT-L/2"\n'))
    assert resolved.settings.method.balance == "per-sample"
    assert resolved.origins["balance"] == "preset dmp-code"


def test_how_a_run_sampled_is_weaker_than_what_is_given(tmp_path, monkeypatch):
    recorded = {"sampling": {"sampler": "ddim", "steps": 20, "cfg": 1.5}, "evaluate": {"eval_images": 64}}
    (tmp_path / "config.json").write_text(json.dumps({"schema_version": 1, "settings": recorded}))
    monkeypatch.setenv("DMPCTL_STEPS", "30")
    resolved = resolve("fid", {"cfg": "2"}, run=tmp_path)
    sampling = resolved.settings.sampling
    assert (sampling.sampler, sampling.steps, sampling.cfg, resolved.settings.fid.max_images) == ("ddim", 30, 2.0, 64)
    assert [resolved.origins[name] for name in ("sampler", "steps", "cfg")] == [f"run {tmp_path}", "DMPCTL_STEPS", "--cfg"]


def test_hyphens_and_public_names_in_a_file(toml):
    resolved = resolve("inspect-gates", {}, toml("json = true\nbatch-size = 3\n[inspect_gates]\nplot = false\n"))
    assert resolved.settings.console.json_output is True
    assert resolved.settings.gates.plot is False


def test_the_file_may_be_named_by_a_variable(monkeypatch, toml):
    monkeypatch.setenv("DMPCTL_CONFIG", str(toml("iters = 9\n")))
    assert resolve("patch", {}).settings.train.iters == 9
    assert resolve("patch", {}, toml("iters = 8\n", "z.toml")).settings.train.iters == 8


def test_an_empty_variable_is_unset(monkeypatch):
    monkeypatch.setenv("DMPCTL_ITERS", "")
    assert resolve("patch", {}).origins["iters"] == "preset digits"


@pytest.mark.parametrize(("written", "value"), [("1", True), ("true", True), ("no", False), ("0", False)])
def test_yes_and_no_in_variables(monkeypatch, written, value):
    monkeypatch.setenv("DMPCTL_JSON", written)
    assert resolve("doctor", {}).settings.console.json_output is value


def test_numbers_among_choices(monkeypatch, toml):
    monkeypatch.setenv("DMPCTL_CHANNELS", "3")
    settings = resolve("patch", {}, toml("cfg-channels = 3\n")).settings
    assert (settings.data.channels, settings.sampling.cfg_channels) == (3, "3")


def test_the_hub_being_offline_is_heard(monkeypatch):
    assert resolve("doctor", {}).settings.console.offline is False
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    resolved = resolve("doctor", {})
    assert (resolved.settings.console.offline, resolved.origins["offline"]) == (True, "HF_HUB_OFFLINE")
    assert resolve("doctor", {"offline": False}).settings.console.offline is False


def test_options_of_other_commands_do_not_disturb(monkeypatch, toml):
    monkeypatch.setenv("DMPCTL_ITERS", "0")
    assert resolve("doctor", {}, toml("lr = -1\n"))


def test_a_no_on_the_command_line_is_its_origin():
    assert resolve("patch", {"hflip": False}).origins["hflip"] == "--no-hflip"


@pytest.mark.parametrize(
    ("given", "starts", "holds"),
    [
        ({"iters": "0"}, "--iters takes a whole number of 1 or more", "found '0'"),
        ({"iters": "many"}, "--iters takes a whole number of 1 or more", "found 'many'"),
        ({"gate": "topkk"}, "--gate takes one of soft, topk", "found 'topkk'"),
        ({"method": "dpm"}, "--method takes one of dmp", "found 'dpm'"),
        ({"device": "gpu"}, "--device takes auto, cpu", "found 'gpu'"),
        ({"gate": "topk"}, "--gate topk needs --topk", ""),
        ({"channels": "2"}, "--channels takes one of 1 or 3, found '2'", ""),
        ({"preset": "digit"}, "--preset takes one of auto, dmp, dmp-code, dmp+ or digits", "found 'digit'"),
    ],
)
def test_a_wrong_flag(given, starts, holds):
    message = sentence("patch", given)
    assert message.startswith(starts)
    assert holds in message


def test_a_wrong_variable(monkeypatch):
    monkeypatch.setenv("DMPCTL_ITERS", "x")
    assert sentence("patch", {}).startswith("DMPCTL_ITERS takes a whole number of 1 or more")


def test_a_wrong_value_in_a_file(toml):
    path = toml("lr = -1\n")
    assert sentence("pretrain", {}, path).startswith(f"{path}: lr takes a number above 0")
    path = toml('[patch]\ngate = "sofd"\n')
    assert sentence("patch", {}, path) == f"{path} [patch]: gate takes one of soft, topk, hard, uniform or random, found 'sofd'"


def test_all_wrong_values_are_named_at_once():
    message = sentence("patch", {"iters": "0", "ema": "1"})
    assert "--iters takes" in message
    assert "--ema takes" in message


@pytest.mark.parametrize("command", ["patch", "doctor"])
def test_an_unknown_variable_names_the_nearest(monkeypatch, command):
    monkeypatch.setenv("DMPCTL_ITRS", "5")
    assert spoken(command, {}) == "DMPCTL_ITRS is no variable of dmpctl (did you mean DMPCTL_ITERS?)"


def test_variables_of_the_tool_itself_are_left_alone(monkeypatch):
    monkeypatch.setenv("_DMPCTL_COMPLETE", "x")
    assert resolve("doctor", {})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("itrs = 5\n", ": itrs is no setting (did you mean iters?)"),
        ("batch-sise = 5\n", ": batch-sise is no setting (did you mean batch_size?)"),
        ("[patch]\npromts = 5\n", " [patch]: promts is no setting (did you mean prompts?)"),
        ("[patch]\ntimesteps = 5\n", " [patch]: timesteps is no setting here, other commands have it (did you mean steps?)"),
        ("[ptch]\niters = 5\n", ": [ptch] is no command of dmpctl (did you mean patch?)"),
        (
            "batch-size = 5\nbatch_size = 6\n",
            ": batch_size is there twice, with a hyphen and an underscore (remove one of the two)",
        ),
        ("[pretrain]\nlrr = 1\n", " [pretrain]: lrr is no setting (did you mean lr?)"),
    ],
)
def test_an_unknown_name_in_a_file(toml, text, says):
    path = toml(text)
    assert spoken("patch", {}, path) == f"{path}{says}"


def test_a_file_that_is_not_toml(toml):
    path = toml("iters =\n")
    assert sentence("patch", {}, path).startswith(f"{path} is not valid TOML")
    path.write_bytes(b"\xff\xfe")
    assert sentence("patch", {}, path).startswith(f"{path} is not text in UTF-8")


def test_a_file_that_is_not_there(tmp_path):
    assert sentence("patch", {}, tmp_path / "no.toml", kind=MissingError) == f"{tmp_path / 'no.toml'} is not there"
    assert "cannot be read" in sentence("patch", {}, tmp_path, kind=MissingError)
