"""The loop itself: rates, averages, steps that are not finite, what is logged. Resume is in tests/e2e."""

import json
import math

import pytest
import torch

from dmpctl.batches.loader import StepBatches
from dmpctl.errors import IntegrityError, NumericalError, UsageError
from dmpctl.files import sha256_of
from dmpctl.runs import checkpoint
from dmpctl.training import subject
from dmpctl.training.clock import Averages
from tests.helpers import flip, patch_run, tensors_of, tree


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def raw_weights(run, step):
    return checkpoint.load(run / "checkpoints" / f"step-{step:07d}").raw


def test_rates_warm_up_and_decay(tmp_path):
    patch_run(tmp_path / "run", iters=8, warmup=3, lr_schedule="cosine", prompt_lr=0.1, gate_lr=0.4)
    factors = [1 / 3, 2 / 3, 1.0, *(0.5 * (1 + math.cos(math.pi * (step - 3) / 5)) for step in range(3, 8))]
    for number, rate in enumerate((0.1, 0.4)):
        assert [line["lr"][number] for line in lines(tmp_path / "run")] == pytest.approx([rate * f for f in factors])


def test_the_average_follows_its_formula(tmp_path):
    """Decay min(ema, (1 + n) / (10 + n)) after the n-th step, recomputed in float64 from the raw weights of every step."""
    patch_run(tmp_path / "run", ema=0.15, save_every=1, keep_last=9, prompt_lr=0.05, gate_lr=0.05)
    expected = None
    for step in range(1, 7):
        raw = {name: value.double() for name, value in raw_weights(tmp_path / "run", step).items()}
        decay = min(0.15, step / (9 + step))  # before the step is counted, n = step - 1
        expected = expected or {name: torch.zeros_like(value) for name, value in raw.items()}
        expected = {name: decay * expected[name] + (1 - decay) * raw[name] for name in raw}
        found = tensors_of(tmp_path / "run" / "checkpoints" / f"step-{step:07d}" / "patch.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-8)
    assert json.loads((tmp_path / "run" / "patch.json").read_text())["weights"] == "ema"


def test_without_an_average_the_weights_are_the_raw_ones(finished):
    published, raw = tensors_of(finished / "patch.safetensors"), raw_weights(finished, 6)
    assert all(torch.equal(published[name], value) for name, value in raw.items())


def test_gradients_are_clipped(tmp_path):
    """With a bound far below every gradient, AdamW sees other moments, and what is logged is the norm before it."""
    patch_run(tmp_path / "free", ema=0.0)
    patch_run(tmp_path / "bound", ema=0.0, grad_clip=1e-5)
    assert lines(tmp_path / "free")[0]["grad_norm"] == lines(tmp_path / "bound")[0]["grad_norm"] > 1e-5
    moments = checkpoint.load(tmp_path / "bound" / "checkpoints" / "step-0000003").optimizer
    total = sum(float(m["exp_avg_sq"].sum()) for m in moments.values())
    assert 0 < total <= 3 * 0.001 * 1e-10 * 1.01  # sum over 3 steps of (1 - beta2) |g|^2


def test_lines_carry_losses_speed_and_memory(finished):
    found = lines(finished)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    for line in found:
        assert {"loss", "mse", "vb", "importance", "grad_norm", "lr"} < set(line)
        assert {"steps_per_sec", "images_per_sec", "data_wait", "peak_memory_mib"} < set(line)
        assert line["loss"] == pytest.approx(line["mse"] + line["vb"] + line["importance"], rel=1e-5)
        assert 0 <= line["data_wait"] <= 1


def test_a_line_is_the_mean_since_the_last(tmp_path, finished):
    patch_run(tmp_path / "run", log_every=4, prompt_lr=0.05, gate_lr=0.05, ema=0.0)
    each = [line["loss"] for line in lines(finished)]
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [4, 6]  # the last step has a line of its own
    assert [line["loss"] for line in found] == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 2], rel=1e-5)


class Spoiled:
    """Stands in for subject.predict_patched: spoils the prediction of some steps."""

    def __init__(self, spoil, *steps: int) -> None:
        self.predict, self.spoil, self.steps, self.step = subject.predict_patched, spoil, steps, 0

    def __call__(self, *args):
        prediction, routing = self.predict(*args)
        self.step += 1
        return (self.spoil(prediction) if self.step in self.steps else prediction), routing


def not_a_number(prediction):
    return prediction * math.nan


def infinite_gradient(prediction):
    """A finite loss (the square root of 0) whose gradient is not."""
    return prediction + (prediction - prediction).abs().sqrt()


@pytest.mark.parametrize("spoil", [not_a_number, infinite_gradient])
def test_a_step_that_is_not_finite_is_skipped(tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(subject, "predict_patched", Spoiled(spoil, 3, 4))
    patch_run(tmp_path / "run", save_every=1, log_every=2, keep_last=9, max_bad_steps=3, ema=0.0)
    before, after = raw_weights(tmp_path / "run", 2), raw_weights(tmp_path / "run", 5)
    assert not any(torch.equal(before[name], after[name]) for name in ("prompt_embeddings", "gate.weight"))
    assert all(value.isfinite().all() for value in after.values())
    found = lines(tmp_path / "run")
    assert "loss" not in found[1]  # of steps 3 and 4 there is nothing to say
    assert all(math.isfinite(found[row]["loss"]) for row in (0, 2))
    assert [path.name[-1] for path in checkpoint.complete(tmp_path / "run" / "checkpoints")] == ["1", "2", "5", "6"]


def test_the_mean_leaves_skipped_steps_out(tmp_path, monkeypatch, finished):
    monkeypatch.setattr(subject, "predict_patched", Spoiled(not_a_number, 2))
    patch_run(tmp_path / "run", iters=2, log_every=2, prompt_lr=0.05, gate_lr=0.05, ema=0.0)
    assert lines(tmp_path / "run")[0]["loss"] == lines(finished)[0]["loss"]


@pytest.mark.parametrize("spoil", [not_a_number, infinite_gradient])
def test_too_many_in_a_row_end_the_run_with_a_good_checkpoint(tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(subject, "predict_patched", Spoiled(spoil, 1, *range(4, 20)))
    with pytest.raises(NumericalError, match=r"not finite 3 steps in a row, last at step 5 with timesteps \[\d+, ") as failure:
        patch_run(tmp_path / "run", iters=20, save_every=1, max_bad_steps=3)
    assert failure.value.exit_code == 5
    seen = StepBatches(1797, 8, 0, 5).at(5)[1].tolist()
    assert failure.value.message.endswith(f"of samples {seen}")
    newest = checkpoint.complete(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name == "step-0000003"
    assert all(value.isfinite().all() for value in checkpoint.load(newest).raw.values())
    assert not (tmp_path / "run" / "patch.safetensors").exists()


def test_a_rate_far_too_high_never_leaves_nan_in_a_checkpoint(tmp_path):
    with pytest.raises(NumericalError, match="not finite"):
        patch_run(tmp_path / "run", iters=40, save_every=1, keep_last=50, prompt_lr=1e30, gate_lr=1e30)
    for path in checkpoint.complete(tmp_path / "run" / "checkpoints"):
        assert all(value.isfinite().all() for value in checkpoint.load(path).raw.values())


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_taken(tmp_path):
    patch_run(tmp_path / "straight", iters=9)
    patch_run(tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "step-0000006" / "trainer.safetensors")
    patch_run(tmp_path / "run", iters=9)
    assert (tmp_path / "run" / "checkpoints" / "step-0000006.damaged").is_dir()
    sessions = json.loads((tmp_path / "run" / "provenance.json").read_text())["sessions"]
    assert "trainer.safetensors is damaged" in sessions[-1]["damaged"][0]
    assert sessions[-1]["start_step"] == 3
    assert sha256_of(tmp_path / "run" / "patch.safetensors") == sha256_of(tmp_path / "straight" / "patch.safetensors")


def test_without_a_whole_checkpoint_nothing_is_begun_anew(tmp_path):
    patch_run(tmp_path / "run")
    for path in checkpoint.complete(tmp_path / "run" / "checkpoints"):
        flip(path / "trainer.safetensors")
    before = tree(tmp_path / "run")
    with pytest.raises(IntegrityError, match=r"no checkpoint in .* is whole: .*trainer\.safetensors is damaged"):
        patch_run(tmp_path / "run", iters=9)
    assert tree(tmp_path / "run") == before | {".lock": tree(tmp_path / "run")[".lock"]}


@pytest.mark.parametrize(
    "given",
    [
        {"gate": "topk", "topk": 4, "balance": "shazeer", "importance_weight": 0.5, "load_weight": 0.5},
        {"balance": "per-sample", "importance_weight": 1.0, "timestep_sampling": "importance"},
        {"method": "full", "lr": 1e-4, "grad_clip": 0.05},
        {"method": "lora", "lr": 1e-2},
    ],
)
def test_parts_of_a_batch_and_blocks_that_run_twice_change_nothing(tmp_path, given):
    """Balance is of the whole batch whatever it is taken in; recomputed blocks give the very same bits."""
    patch_run(tmp_path / "whole", **given)
    patch_run(tmp_path / "parts", grad_accum=4, **given)
    patch_run(tmp_path / "twice", grad_checkpoint=True, **given)
    whole, parts = (tensors_of(tmp_path / name / "patch.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(
            parts[name], value, rtol=1e-4, atol=2e-5
        )  # where a gradient is near 0, AdamW makes much of its rounding
    assert sha256_of(tmp_path / "twice" / "patch.safetensors") == sha256_of(tmp_path / "whole" / "patch.safetensors")
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        for name in {"loss", "mse", "grad_norm", "importance", "load"} & set(one):
            assert other[name] == pytest.approx(one[name], rel=2e-4)


def test_a_batch_that_does_not_divide_into_parts_is_refused(tmp_path):
    with pytest.raises(UsageError, match="a batch of 8 does not divide over 1 processes x 3 parts"):
        patch_run(tmp_path / "run", grad_accum=3)


def test_fsdp_needs_several_processes(tmp_path):
    with pytest.raises(UsageError, match="--fsdp shares weights out over several processes"):
        patch_run(tmp_path / "run", fsdp=True)


def test_a_batch_of_one_and_more_than_the_data(tmp_path):
    patch_run(tmp_path / "one", batch_size=1, iters=2)
    patch_run(tmp_path / "all", batch_size=2000, iters=1)


def test_guidance_that_cannot_be_fails_before_training(tmp_path):
    with pytest.raises(UsageError, match=r"guidance 1\.5 needs a backbone with classes or captions"):
        patch_run(tmp_path / "run", evaluate=True, cfg=1.5)
    assert not (tmp_path / "run").exists()


def test_averages_start_anew():
    averages = Averages()
    assert averages.take() == {}
    averages.add({"a": torch.tensor(1.0)})
    averages.add({})
    averages.add({"a": torch.tensor(2.0)})
    assert averages.take() == {"a": 1.5}
    assert averages.take() == {}
