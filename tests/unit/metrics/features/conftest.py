"""Inception without its weights: random ones in torch-fidelity's own file format, written once for all tests here."""

import io
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def images(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def random_trunk() -> nn.Module:
    """torch-fidelity's network with random weights and batch norms that fit them, so that features tell images apart."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=nothing)
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.train()
        module.momentum = None
    with torch.no_grad():
        trunk(images(4, 48, 48))
    return trunk.eval()


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_trunk().state_dict(), path)
    return path
