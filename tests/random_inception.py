"""Inception without its weights: random ones in torch-fidelity's own file format, with batch norms that fit them."""

import io
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def random_images(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    """uint8 [count, channels, height, width]."""
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def random_trunk(seed: int = 0) -> nn.Module:
    """torch-fidelity's network, calibrated so that features tell images apart."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=nothing)
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.train()
        module.momentum = None
    with torch.no_grad():
        trunk(random_images(4, 48, 48))
    return trunk.eval()


def write_random_inception(path: Path, seed: int = 0) -> Path:
    """Its state dict as torch-fidelity's file."""
    torch.save(random_trunk(seed).state_dict(), path)
    return path
