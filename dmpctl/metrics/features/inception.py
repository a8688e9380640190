"""Inception-v3 (TF 2015-12-05) by torch-fidelity, behind the preprocessing of the tool whose numbers are wanted."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dmpctl.errors import IntegrityError, MissingError
from dmpctl.files import sha256_of
from dmpctl.metrics.features.networks import NetworkExtractor, one_line, read_state_dict
from dmpctl.metrics.features.protocols import Preprocessing
from dmpctl.metrics.features.resize import clean, half_pixel, tf1
from dmpctl.types import Outputs

PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FETCH = "`dmpctl download inception` fetches it"
# The layers up to pool_3, each a module whose output is the next one's input.
LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1, as ADM's evaluator takes them: 17 x 17 x 7 = 2023 numbers
# What is done to pixels before the network, in words that go into the fingerprint, and by what.
PREPROCESSINGS: dict[Preprocessing, tuple[str, Callable[[Tensor], Tensor]]] = {
    "adm": ("tf1-bilinear-299 (v-128)/128 pool_3", tf1),
    "pytorch-fid": ("half-pixel-bilinear-299 2v/255-1 pool_3", half_pixel),
    "clean": ("pil-bicubic-antialias-299 (v-128)/128 pool_3", clean),
}


class Inception(NetworkExtractor):
    """uint8 images [B, 1 or 3, H, W] of any size -> float32 pool_3 features [B, 2048], on `device`.

    `pinned` refuses any weights file but the published one; otherwise `known` says whether it is that one.
    `preprocessing`: resize to 299x299 and range as ADM's evaluator, pytorch-fid or clean-fid have them.
    """

    name = "inception"
    width = 2048

    def __init__(
        self,
        weights: Path,
        pinned: bool = True,
        device: torch.device | str = "cpu",
        preprocessing: Preprocessing = "adm",
    ) -> None:
        """Load `weights`, checked before it is opened.

        Raises MissingError if it is not there, IntegrityError for another hash (when pinned) or not these weights.
        """
        if not weights.is_file():
            raise MissingError(f"the Inception weights {weights} are not there", FETCH)
        self.sha256 = sha256_of(weights)
        self.known = self.sha256 == PUBLISHED_SHA256
        if pinned and not self.known:
            raise IntegrityError(f"{weights} has sha256 {self.sha256}, expected {PUBLISHED_SHA256}", FETCH)
        super().__init__("Inception", device)
        self._words, self._prepare = PREPROCESSINGS[preprocessing]
        network = _build(read_state_dict(weights, FETCH), weights).to(self._device)
        self._layers = [network.get_submodule(name) for name in LAYERS]
        self._maps = network.get_submodule("Mixed_6d.branch1x1")
        self._classes: Tensor = network.get_parameter("fc.weight")

    @property
    def fingerprint(self) -> str:
        """Weights and preprocessing; says "unpinned" unless the weights are the published ones."""
        pin = "" if self.known else " unpinned"
        return f"inception-2015-12-05{pin} sha256:{self.sha256} {self._words}"

    def _run(self, images: Tensor) -> Outputs:
        """Features; logits [B, 1008] without the bias, as the Inception Score takes them; spatial [B, 2023].

        Spatial: 7 channels of a 17x17 map after its ReLU, flattened rows first and channels last, as TensorFlow has them.
        """
        maps: list[Tensor] = []
        keep = self._maps.register_forward_hook(lambda _module, _inputs, output: maps.append(output[:, :SPATIAL_CHANNELS]))
        try:
            x = self._prepare(images).expand(-1, 3, -1, -1)
            for layer in self._layers:
                x = layer(x)
            features = x.flatten(1)
            return Outputs(features, features @ self._classes.T, maps[0].permute(0, 2, 3, 1).flatten(1))
        finally:
            keep.remove()


def _build(state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """torch-fidelity's network with `state`. Raises IntegrityError for missing, unexpected or misshapen tensors.

    Its constructor always unpickles a file without restriction, so it is handed one that we have just written ourselves.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    checked = io.BytesIO()
    torch.save(state, checked)
    checked.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # its initialisation must not shift anyone's random numbers
            trunk: nn.Module = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=checked)
    except RuntimeError as error:
        raise IntegrityError(f"{path} does not fit Inception-v3 ({one_line(error)})", FETCH) from None
    return trunk
