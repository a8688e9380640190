"""Completion in bash, asked the way the shell asks."""

import pytest


@pytest.fixture
def completed(dmpctl_, monkeypatch):
    def ask(line: str) -> list[str]:
        monkeypatch.setenv("_DMPCTL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - (not line.endswith(" "))))
        code, out, err = dmpctl_()
        assert (code, err) == (0, "")
        return out.split()

    return ask


def test_commands(completed):
    assert completed("dmpctl p") == ["pretrain", "patch", "push"]


def test_option_names(completed):
    assert completed("dmpctl patch --ga") == [
        "--gate",
        "--gate-input",
        "--gate-per-site",
        "--gate-scale",
        "--gate-noise",
        "--gate-lr",
    ]
    assert "--no-gate-noise" in completed("dmpctl patch --no-")


def test_options_of_one_command_only(completed):
    assert completed("dmpctl sample --num-im") == ["--num-images"]
    assert completed("dmpctl patch --num-im") == []


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("dmpctl patch --gate ", ["soft", "topk", "hard", "uniform", "random"]),
        ("dmpctl patch --gate t", ["topk"]),
        ("dmpctl patch --channels ", ["1", "3"]),
        ("dmpctl patch --iters 5 --balance p", ["per-sample"]),
        ("dmpctl sample runs/x --sampler dd", ["ddpm", "ddim"]),
    ],
)
def test_choices(completed, line, choices):
    assert completed(line) == choices


def test_the_script_for_bash(dmpctl_, monkeypatch):
    monkeypatch.setenv("_DMPCTL_COMPLETE", "source_bash")
    code, out, _ = dmpctl_()
    assert code == 0
    assert "_DMPCTL_COMPLETE=complete_bash" in out
