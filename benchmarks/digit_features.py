"""A small classifier of the digits; its 64 penultimate features are a second space to measure Fréchet distances in.

`python -m benchmarks.digit_features` trains it anew (seconds) into benchmarks/assets/digit-classifier.safetensors.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmpctl.data.bundled import Digits
from dmpctl.files import read_tensors, sha256_of, write_tensors

WEIGHTS = Path(__file__).parent / "assets" / "digit-classifier.safetensors"


class Classifier(nn.Module):
    """Two convolutions and two linear layers: uint8 [B, 1, 8, 8] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.out = nn.Linear(32 * 4 * 4, 64), nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features [B, 64] before their activation, so that none is constant."""
        x = F.relu(self.conv1(images.float() / 127.5 - 1))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.hidden(x.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(F.relu(self.features(images)))


class DigitFeatures:
    """The trained classifier as an extractor (types.Extractor)."""

    name = "digit-classifier"
    width = 64

    def __init__(self) -> None:
        self._net = Classifier().eval()
        self._net.load_state_dict(read_tensors(WEIGHTS)[0])
        self.fingerprint = f"digit-classifier sha256:{sha256_of(WEIGHTS)}"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        return self._net.features(images)


def train() -> tuple[Classifier, float]:
    """Train on every digit but each fifth, which is held out; returns the net and its accuracy there."""
    torch.manual_seed(0)
    source, net = Digits(), Classifier()
    held_out = torch.arange(len(source)) % 5 == 0
    images, labels = source.images(), source.labels()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    known = torch.nonzero(~held_out).flatten()
    for _ in range(30):
        for batch in known[torch.randperm(len(known))].split(64):
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    with torch.inference_mode():
        accuracy = (net(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    return net, accuracy


def main() -> None:
    net, accuracy = train()
    WEIGHTS.parent.mkdir(exist_ok=True)
    write_tensors(WEIGHTS, net.state_dict(), {"held_out_accuracy": f"{accuracy:.4f}"})


if __name__ == "__main__":
    main()
