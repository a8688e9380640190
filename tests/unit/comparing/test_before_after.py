"""Patch against backbone: a patch that does nothing, one that does harm, and what is recorded."""

import json
import os
import signal

import pytest
import torch

from dmpctl.comparing import before_after
from dmpctl.comparing.paired_loss import LossDifference, loss_verdict
from dmpctl.data.bundled import Digits
from dmpctl.errors import Interrupted
from dmpctl.measuring.verdict import distance_verdict
from dmpctl.metrics.frechet import FidEstimate, PairedDifference
from dmpctl.models.patch_files import load_patch
from dmpctl.processes.command import Command
from dmpctl.training import patch
from dmpctl.types import Silent
from tests.helpers import SMALL, copied, files, patch_run, settings_for

EVALUATED = {"evaluate": True, "eval_images": 130, "steps": 3, "prompt_lr": 0.05, "gate_lr": 0.05, "ema": 0.0}


@pytest.fixture(autouse=True)
def _few_images(most_loss_images):
    most_loss_images(50)


def compared(model, **given):
    settings = settings_for("patch", **{"eval_images": 130, "steps": 3, "cpu": True, **given})
    return before_after.measure(model, Digits(), Command.alone(settings, Silent()))


def test_a_patch_that_does_nothing(finished):
    model = load_patch(finished)
    torch.nn.init.zeros_(model.patch.prompt_embeddings)
    figures, sheet = compared(model)
    assert figures.difference == before_after.DistanceGap(value=0.0, standard_error=0.0, p_value=1.0)
    assert figures.backbone == figures.patched
    assert figures.paired_loss.difference == 0
    assert figures.verdict.startswith("no significant change: +0 % (95 % confidence")
    assert figures.paired_loss_verdict.startswith("no significant change")
    assert before_after.table(figures)[2]["Fréchet distance (pixels, 130 images)"] == "+0.0000 ± 0"
    width = (sheet.width - 24) // 2
    assert sheet.crop((0, 22, width, sheet.height)).tobytes() == sheet.crop((width + 24, 22, sheet.width, sheet.height)).tobytes()


def test_a_patch_that_does_harm(finished):
    model = load_patch(finished)
    torch.nn.init.normal_(model.patch.prompt_embeddings, std=30, generator=torch.Generator().manual_seed(0))
    figures, _ = compared(model)
    assert figures.verdict.startswith("worse: +")
    assert figures.paired_loss_verdict.startswith("worse")
    assert figures.difference.value > 0 < figures.paired_loss.difference
    assert figures.difference.p_value < 1e-6
    json.dumps(figures.model_dump(mode="json"), allow_nan=False)


def gap_of(value: float, error: float | None, before: float) -> PairedDifference:
    """A paired difference from a backbone at this distance."""
    side = FidEstimate(before, 0.1, 5000, 1797)
    return PairedDifference(value, error, None, None, 5000, 1797, side, side)


def loss_of(difference: float, error: float, before: float, held_out: bool = False) -> LossDifference:
    return LossDifference(before, before + difference, difference, error, 7, (), (), held_out)


def test_verdicts_say_how_much_and_on_what():
    assert distance_verdict(gap_of(-1.0, 0.1, 20.0)).startswith("improved: -5 % (95 % confidence over the sampling of images")
    assert distance_verdict(gap_of(1.0, None, 20.0)).startswith("no verdict")
    assert distance_verdict(gap_of(-0.2, 0.01, 20.0)) == (
        "too small a change to name: -1 % (95 % confidence over the sampling of images; under 1.3 % one training seed is "
        "inconclusive)"
    )
    assert loss_verdict(loss_of(-1e-2, 1e-4, 0.7)) == "improved: -1.4 % (95 % confidence over the 7 training images)"
    assert "7 held-out images" in loss_verdict(loss_of(-1e-2, 1e-4, 0.7, held_out=True))
    assert loss_verdict(loss_of(-1.1e-5, 1e-8, 0.687)).startswith("too small a change to name: -0.0016 %")
    assert loss_verdict(loss_of(-1e-2, 1e-2, 0.7)).startswith("no significant change")


def test_too_few_images_for_a_verdict(finished):
    figures, _ = compared(load_patch(finished), eval_images=90)
    assert figures.difference.standard_error is None
    assert figures.verdict.startswith("no verdict")
    before_after.table(figures)


def test_too_few_images_for_a_distance_are_refused_as_by_fid(finished, cli, tmp_path):
    """One rule and one sentence: the same number of images, by the same features."""
    figures, _ = compared(load_patch(finished), eval_images=30)
    assert figures.difference is None
    sentence = "30 images are too few for 64 features: the distance would be mostly bias"
    assert sentence in figures.no_distance
    before_after.table(figures)
    refused = cli("fid", copied(finished, tmp_path / "run"), "--max-images", 30, "--cpu")
    assert (refused.code, sentence in refused.err) == (2, True)


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


@pytest.mark.parametrize("change", [{"eval_images": 131}, {"steps": 4}, {"sample_seed": 1}])
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
            if by == 130:  # the first batch of images
                os.kill(os.getpid(), signal.SIGTERM)

    settings = settings_for("patch", run=tmp_path / "run", **SMALL | EVALUATED)
    with pytest.raises(Interrupted, match="after 130 of 130 images") as failure:
        patch.patch(settings, Cut())
    assert failure.value.exit_code == 143
    assert "patch.safetensors" in files(tmp_path / "run")
    report = patch.patch(settings, Silent())
    assert report.data["step"] == 6
    assert "metrics/comparison-0000006.json" in files(tmp_path / "run")
