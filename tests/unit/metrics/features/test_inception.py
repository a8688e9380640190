"""Inception without its weights: random ones in torch-fidelity's own file format, and torch-fidelity as the oracle."""

import hashlib
import io
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.metrics.features import inception
from dmpctl.metrics.features.inception import PUBLISHED_SHA256, Inception


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


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_trunk().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights) -> Inception:
    return Inception(weights, pinned=False)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (299, 299), (40, 330)])
def test_features_are_torch_fidelitys(weights, extractor, height, width):
    x = images(4, height, width)
    oracle = FeatureExtractorInceptionV3("oracle", ["2048"], feature_extractor_weights_path=str(weights))
    expected = oracle(x)[0]
    found = extractor(x)
    assert found.shape == (4, 2048)
    assert expected.std(dim=0).mean() > 0.02  # the images differ, so equality means something
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_features_are_torchmetrics_without_antialiasing(weights, extractor):
    from torchmetrics.image.fid import FrechetInceptionDistance

    x = images(4, 64, 64)
    theirs = FrechetInceptionDistance(feature_extractor_weights_path=str(weights), antialias=False)
    torch.testing.assert_close(extractor(x), theirs.inception(x), atol=1e-4, rtol=0)
    aliased = FrechetInceptionDistance(feature_extractor_weights_path=str(weights), antialias=True)
    assert (extractor(x) - aliased.inception(x)).abs().max() > 1e-2  # half a pixel of resize shows


def test_grey_is_three_equal_channels(extractor):
    grey = images(2, 16, 16, channels=1)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_weights_that_are_not_the_published_ones_are_refused(weights):
    with pytest.raises(IntegrityError) as refused:
        Inception(weights)
    for part in (str(weights), PUBLISHED_SHA256, hashlib.sha256(weights.read_bytes()).hexdigest()):
        assert part in refused.value.message
    assert refused.value.exit_code == 4


def test_unpinned_weights_say_so(weights, extractor):
    assert not extractor.known
    assert "unpinned" in extractor.fingerprint
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in extractor.fingerprint


def test_the_published_weights_are_known_even_when_not_pinned(weights, monkeypatch):
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    pinned, unpinned = Inception(weights), Inception(weights, pinned=False)
    assert pinned.known
    assert unpinned.known
    assert pinned.fingerprint == unpinned.fingerprint
    assert "unpinned" not in pinned.fingerprint


def test_a_flipped_byte_is_noticed(weights, tmp_path, monkeypatch):
    data = bytearray(weights.read_bytes())
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", hashlib.sha256(data).hexdigest())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(data)
    with pytest.raises(IntegrityError, match="expected"):
        Inception(tmp_path / "flipped.pth")


def test_missing_weights_name_the_command_that_fetches_them(tmp_path):
    with pytest.raises(MissingError) as missing:
        Inception(tmp_path / "none.pth")
    assert missing.value.exit_code == 3
    assert "dmpctl download inception" in (missing.value.hint or "")


class Hostile:
    """Unpickled without care, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_a_malicious_file_runs_no_code(tmp_path):
    target, path = tmp_path / "ran", tmp_path / "hostile.pth"
    torch.save({"weight": Hostile(target)}, path)
    with pytest.raises(IntegrityError, match="not a readable weights file"):
        Inception(path, pinned=False)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 half a zip", b"\x80\x02"])
def test_a_file_of_something_else_is_an_integrity_error(tmp_path, content):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"other\.pth"):
        Inception(path, pinned=False)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {"epoch": 3}, {"state_dict": {"w": torch.zeros(1)}}, {1: torch.zeros(1)}]
)
def test_a_file_without_a_state_dict_is_an_integrity_error(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(IntegrityError, match="state dict"):
        Inception(tmp_path / "other.pth", pinned=False)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_weights_of_another_network_are_an_integrity_error(weights, tmp_path, fault):
    state = torch.load(weights, weights_only=True)
    match fault:
        case "missing":
            del state["Mixed_7c.branch1x1.conv.weight"]
        case "unexpected":
            state["head.weight"] = torch.zeros(1)
        case "misshapen":
            state["Mixed_7c.branch1x1.conv.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(IntegrityError, match="does not fit Inception") as refused:
        Inception(tmp_path / "other.pth", pinned=False)
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 400


def test_loading_leaves_everyones_random_numbers_alone(weights):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Inception(weights, pinned=False)
    assert torch.equal(torch.rand(3), expected)


def test_extraction_is_true_float32_and_leaves_no_trace(weights):
    own = Inception(weights, pinned=False)
    convolution, seen = torch.backends.cudnn.conv, []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((convolution.fp32_precision, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), output.dtype))

    own._trunk.Conv2d_1a_3x3.conv.register_forward_hook(look)
    before = convolution.fp32_precision
    try:
        convolution.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = own(images(1, 8, 8))
        assert seen == [("ieee", False, False, torch.float32)]
        assert convolution.fp32_precision == "tf32"
        with pytest.raises(RuntimeError), patch.object(own._trunk, "forward", side_effect=RuntimeError):
            own(images(1, 8, 8))
        assert convolution.fp32_precision == "tf32"
    finally:
        convolution.fp32_precision = before
    assert not features.requires_grad
    assert not any(module.training for module in own._trunk.modules())


@pytest.mark.parametrize("channels", [2, 4])
def test_only_grey_and_rgb(extractor, channels):
    with pytest.raises(UsageError, match=f"{channels} channels"):
        extractor(images(1, 8, 8, channels))
