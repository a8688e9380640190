"""Text that users write, whatever wrote it: one reader, and one sentence for what it cannot read."""

import codecs
import os
from pathlib import Path

import pytest

from dmpctl.errors import UsageError
from dmpctl.models.conditions import prompts_for
from dmpctl.settings.layers import resolve
from dmpctl.texts import decoded, lines_of
from tests.helpers import QUICK, digit_folder, settings_for

RED = "a red car\r\n\r\nlast\u2028line\n \na\x0cform\x85feed\n"
PROMPTS = ["a red car", "last\u2028line", "a\x0cform\x85feed"]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_prompts_are_the_lines_of_their_file(tmp_path, mark):
    """One prompt to a line that is not blank; a byte order mark and Unicode's own line separators are no lines."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(mark + RED.encode())
    texts, about = prompts_for(settings_for("sample", prompts_from=str(path)), None, 9)
    assert texts == PROMPTS
    assert about["captions"] == 3


def test_a_settings_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "s.toml").write_bytes(codecs.BOM_UTF8 + b"iters = 7\r\n[patch]\r\nseed = 3\r\n")
    settings = resolve("patch", {}, tmp_path / "s.toml").settings
    assert (settings.train.iters, settings.run.seed) == (7, 3)


@pytest.mark.parametrize("form", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["prompts.txt", "s.toml"])
def test_text_in_another_encoding_is_named_with_its_line(tmp_path, cli, name, form):
    text = "one = 1\n# caf\xe9\n"
    (tmp_path / name).write_bytes(text.encode(form))
    given = ["--prompts", tmp_path / name] if name == "prompts.txt" else ["--config", tmp_path / name]
    with pytest.raises(UsageError, match=r"is not text in UTF-8: byte 0x(e9 in line 2|ff in line 1), at \d+") as caught:
        decoded((tmp_path / name).read_bytes(), name)
    assert caught.value.message.startswith(name)
    if name == "s.toml":
        done = cli("patch", "--dry-run", *given)
        assert done.code == 2
        assert f"{tmp_path / name} is not text in UTF-8" in done.err
    else:
        with pytest.raises(UsageError, match=r"prompts\.txt is not text in UTF-8"):
            prompts_for(settings_for("sample", prompts_from=str(tmp_path / name)), None, 9)


def test_lines_end_at_line_feeds_alone():
    assert lines_of("a\r\nb\rc\n\n\t\nd") == ["a", "b\rc", "d"]
    assert lines_of("") == []


@pytest.mark.parametrize("which", ["run", "data", "here"])
def test_a_path_that_is_not_utf_8_is_refused_before_training(tmp_path, cli, monkeypatch, which):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    odd.mkdir()
    digits = digit_folder((odd if which == "data" else tmp_path) / "digits", 9)
    monkeypatch.chdir(odd if which == "here" else tmp_path)
    given = {"run": ["--data", "digits", "--run", odd / "run"], "data": ["--data", digits], "here": ["--data", "digits"]}
    done = cli("pretrain", *given[which], *QUICK)
    assert done.code == 2
    assert "is not UTF-8" in done.err
    assert r"\udcff" in done.err
    assert not list(odd.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("metrics.jsonl"))
