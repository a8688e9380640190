"""The same commands on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmpctl.files import sha256_of
from dmpctl.models.patch_files import load_patch
from dmpctl.runs import checkpoint
from dmpctl.runs.rundir import RunDir
from dmpctl.sampling.generate import generate
from dmpctl.settings.measuring import Sampling
from tests.helpers import environment, patch_run, tensors_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
pytestmark.append(pytest.mark.usefixtures("fresh_precision"))
GPU = {"cpu": False, "device": "cuda"}


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_patch_trains_on_the_gpu_and_leaves_its_backbone_alone(tmp_path: Path, precision: str) -> None:
    report = patch_run(tmp_path / "run", precision=precision, **GPU)
    assert report.data["step"] == 6
    model = load_patch(tmp_path / "run")  # refuses a changed backbone
    assert model.patch is not None
    assert model.patch.prompt_embeddings.abs().max() > 0


def test_images_are_those_of_the_cpu(tmp_path: Path) -> None:
    patch_run(tmp_path / "run", **GPU)
    settings = Sampling(sampler="ddim", steps=10)
    devices = (torch.device("cpu"), torch.device("cuda"))
    cpu, cuda = (generate(load_patch(tmp_path / "run").to(device), range(8), settings, device) for device in devices)
    difference = (cpu.int() - cuda.int()).abs()
    assert difference.float().mean() < 1


def test_resumed_is_uninterrupted_to_the_bit_with_deterministic_kernels(tmp_path: Path) -> None:
    given = {"deterministic": True, "prompt_lr": 0.05, "ema": 0.9, **GPU}
    try:
        patch_run(tmp_path / "straight", iters=12, **given)
        for iters in (7, 12):
            patch_run(tmp_path / "run", iters=iters, **given)
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = (sha256_of(tmp_path / name / "patch.safetensors") for name in ("straight", "run"))
    assert one == other


def test_a_scaler_survives_a_resume(tmp_path: Path) -> None:
    for iters in (4, 9):
        patch_run(tmp_path / "run", iters=iters, precision="fp16", **GPU)
    assert checkpoint.load(checkpoint.complete(tmp_path / "run" / "checkpoints")[-1]).scaler["scale"] > 0


@pytest.mark.parametrize(
    "given",
    [{"compile": True}, {"precision": "bf16", "backbone_dtype": "bf16"}, {"grad_checkpoint": True}],
)
def test_what_makes_it_faster_or_smaller_trains_the_same_patch(tmp_path: Path, given: dict[str, object]) -> None:
    plain = {"precision": given["precision"]} if "precision" in given else {}
    patch_run(tmp_path / "one", prompt_lr=0.05, **plain, **GPU)
    patch_run(tmp_path / "two", prompt_lr=0.05, **given, **GPU)
    one, two = ([line["loss"] for line in RunDir(tmp_path / name).metrics.lines()] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=2e-3)  # AdamW turns the sign of a gradient near zero into a whole step
    assert tensors_of(tmp_path / "two" / "patch.safetensors")["prompt_embeddings"].abs().max() > 0


def test_one_process_in_a_group_of_its_own(tmp_path: Path) -> None:
    """The way of many GPUs (gloo and NCCL, DDP left out by accelerate) with one."""
    line = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "--", "dmpctl", "patch", "--run", str(tmp_path / "run")]
    line += ["--iters", "6", "--batch-size", "8", "--device", "cuda", "--no-evaluate"]
    done = subprocess.run([sys.executable, *line], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
