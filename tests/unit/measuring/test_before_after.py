"""Patch against backbone: a patch that does nothing, one that does harm, and what is recorded."""

import json
import os
import signal

import pytest
import torch

from dmpctl.data.bundled import Digits
from dmpctl.errors import Interrupted
from dmpctl.measuring import before_after
from dmpctl.measuring.verdict import distance_verdict, loss_verdict
from dmpctl.models.patch_files import load_patch
from dmpctl.processes.command import Command
from dmpctl.training import patch
from dmpctl.types import Silent
from tests.helpers import SMALL, copied, files, patch_run, settings_for

EVALUATED = {"evaluate": True, "eval_images": 90, "steps": 3, "prompt_lr": 0.05, "gate_lr": 0.05, "ema": 0.0}


@pytest.fixture(autouse=True)
def _few_images(most_loss_images):
    most_loss_images(50)


def compared(model, **given):
    settings = settings_for("patch", **{"eval_images": 90, "steps": 3, "cpu": True, **given})
    return before_after.measure(model, Digits(), Command.alone(settings, Silent()))


def test_a_patch_that_does_nothing(finished):
    model = load_patch(finished)
    torch.nn.init.zeros_(model.patch.prompt_embeddings)
    figures, sheet = compared(model)
    assert figures.difference == before_after.DistanceGap(value=0.0, standard_error=0.0, p_value=1.0)
    assert figures.backbone == figures.patched
    assert figures.paired_loss.difference == 0
    assert figures.verdict.startswith("no significant change (95 % confidence")
    assert figures.paired_loss_verdict.startswith("no significant change")
    assert before_after.table(figures)[2]["Fréchet distance (pixels, 90 images)"] == "+0.0000 ± 0.0000"
    width = (sheet.width - 24) // 2
    assert sheet.crop((0, 22, width, sheet.height)).tobytes() == sheet.crop((width + 24, 22, sheet.width, sheet.height)).tobytes()


def test_a_patch_that_does_harm(finished):
    model = load_patch(finished)
    torch.nn.init.normal_(model.patch.prompt_embeddings, std=30, generator=torch.Generator().manual_seed(0))
    figures, _ = compared(model)
    assert figures.verdict.startswith("worse (95 % confidence")
    assert figures.paired_loss_verdict.startswith("worse")
    assert figures.difference.value > 0 < figures.paired_loss.difference
    assert figures.difference.p_value < 1e-6
    json.dumps(figures.model_dump(mode="json"), allow_nan=False)


def test_verdicts():
    assert distance_verdict(-1.0, 0.1).startswith("improved (95 % confidence over the sampling of images")
    assert distance_verdict(1.0, None).startswith("no verdict")
    assert loss_verdict(-1e-5, 1e-6, 7) == "improved (95 % confidence over the 7 training images)"


def test_too_few_images_for_a_verdict(finished):
    figures, _ = compared(load_patch(finished), eval_images=30)
    assert figures.difference.standard_error is None
    assert figures.verdict.startswith("no verdict")
    before_after.table(figures)


def test_a_complete_run_shows_what_it_has_recorded(tmp_path, monkeypatch):
    first = patch_run(tmp_path / "run", **EVALUATED)
    assert {"before-after.png", "metrics/comparison-0000006.json"} < files(tmp_path / "run")
    assert first.lines[0].startswith("trained 6 steps in ")
    before = (tmp_path / "run" / "metrics" / "comparison-0000006.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(before_after, "measure", None)  # not made again
        again = patch_run(tmp_path / "run", **EVALUATED)
    assert again.lines[0].startswith("the run was complete already, at step 6")
    assert again.table == first.table
    assert again.data["verdict"] == first.data["verdict"]
    assert (tmp_path / "run" / "metrics" / "comparison-0000006.json").read_bytes() == before


@pytest.mark.parametrize("change", [{"eval_images": 91}, {"steps": 4}, {"sample_seed": 1}])
def test_another_protocol_is_measured_anew(tmp_path, finished, change):
    run = copied(finished, tmp_path / "run")
    patch_run(run, **EVALUATED)
    patch_run(run, **EVALUATED | change)
    recorded = json.loads((run / "metrics" / "comparison-0000006.json").read_text())["protocol"]
    expected = before_after.protocol(settings_for("patch", **SMALL | EVALUATED | change), Digits())
    assert recorded == expected.model_dump(mode="json")


def test_an_interrupted_comparison_is_made_by_the_same_command(tmp_path):
    class Cut(Silent):
        def advance(self, by: int = 1, **figures: float) -> None:
            if by == 90:  # the first batch of images
                os.kill(os.getpid(), signal.SIGTERM)

    settings = settings_for("patch", run=tmp_path / "run", **SMALL | EVALUATED)
    with pytest.raises(Interrupted, match="after 90 of 90 images") as failure:
        patch.patch(settings, Cut())
    assert failure.value.exit_code == 143
    assert "patch.safetensors" in files(tmp_path / "run")
    report = patch.patch(settings, Silent())
    assert report.data["step"] == 6
    assert "metrics/comparison-0000006.json" in files(tmp_path / "run")
