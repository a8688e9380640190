"""Features of timm's networks: DINOv2 for FD-DINOv2 (Stein et al. 2023), and any other by its name."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.files import sha256_of
from dmpctl.metrics.features.networks import NetworkExtractor, one_line, read_state_dict
from dmpctl.metrics.features.resize import antialiased
from dmpctl.types import Outputs

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIDE = 224  # in pixels; the network was trained at 518, its distance is taken at 224
HINT = "add --extractor-weights FILE, a .safetensors file or a .pt of plain tensors in timm's layout"


class TimmFeatures(NetworkExtractor):
    """uint8 images [B, 1 or 3, H, W] -> float32 [B, width]: the numbers before a timm network's classes, on `device`.

    Resized by antialiased bicubic to the network's own side, with its own mean and deviation. Of DINOv2 that is the class
    token, at 224 pixels.
    """

    known = False  # no weights are pinned by their hash; the fingerprint has it

    def __init__(self, model: str, weights: Path, device: torch.device | str = "cpu") -> None:
        """The network `model` with `weights`, a .safetensors file or a .pt of plain tensors.

        Raises UsageError for a model that timm does not know, MissingError without the file, IntegrityError where it does
        not fit.
        """
        import timm
        from timm.data.config import resolve_model_data_config

        if not timm.is_model(model):
            near = get_close_matches(model, timm.list_models(), n=3)
            raise UsageError(f"timm has no model {model}", f"near it: {', '.join(near)}" if near else "see timm.list_models()")
        if not weights.is_file():
            raise MissingError(f"the weights {weights} of {model} are not there", HINT)
        self.name = "dinov2" if model == DINOV2 else f"timm-{model}"
        self.sha256 = sha256_of(weights)
        super().__init__(model, device)
        network = _build(model, weights)
        config = resolve_model_data_config(network)  # type: ignore[no-untyped-call]  # timm's own
        self._side = DINOV2_SIDE if model == DINOV2 else int(config["input_size"][-1])
        self._mean, self._std = tuple(config["mean"]), tuple(config["std"])
        self._network = network.eval().requires_grad_(False).to(self._device)
        self.width = int(network.num_features)

    @property
    def fingerprint(self) -> str:
        """Network, weights and preprocessing."""
        seen = f"bicubic-antialias-{self._side} mean {self._mean} std {self._std}"
        return f"{self.name} timm:{self._title} sha256:{self.sha256} {seen}"

    def _run(self, images: Tensor) -> Outputs:
        """Features alone: there are no classes, and no maps that a published distance is taken in."""
        rgb = images.expand(-1, 3, -1, -1)
        return Outputs(self._network(antialiased(rgb, self._side, self._mean, self._std)))


def _build(model: str, weights: Path) -> Any:
    """timm's network, its weights adapted as timm does (side, classes). Raises IntegrityError where they do not fit."""
    import timm

    state = read_state_dict(weights, HINT)
    size: dict[str, Any] = {"img_size": DINOV2_SIDE} if model == DINOV2 else {}
    try:
        with torch.random.fork_rng(devices=[]):  # its initialisation must not shift anyone's random numbers
            network: nn.Module = timm.create_model(
                model, pretrained=True, num_classes=0, pretrained_cfg_overlay={"state_dict": state}, **size
            )
    except (RuntimeError, KeyError, ValueError) as error:
        raise IntegrityError(f"{weights} does not fit {model} ({one_line(error)})", HINT) from None
    lacking = sorted(set(network.state_dict()) - set(state))  # timm itself only warns
    if lacking:
        raise IntegrityError(f"{weights} does not fit {model}: it lacks {len(lacking)} tensors, {lacking[0]} first", HINT)
    return network
