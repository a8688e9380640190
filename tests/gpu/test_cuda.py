"""The same commands on a GPU."""

from pathlib import Path

import pytest
import torch

from dmpctl.engine.generate import generate
from dmpctl.engine.patched import load_patch
from dmpctl.settings.sections import Sampling
from tests.helpers import patch_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
GPU = {"cpu": False, "device": "cuda"}


@pytest.mark.parametrize("precision", ["no", "bf16"])
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
