"""Guidance on a toy predictor whose prediction tells labels apart."""

import pytest
import torch
from torch import Tensor

from dmpctl.diffusion.guidance import guide
from dmpctl.errors import UsageError

NULL = torch.tensor([10])
COND = torch.tensor([0, 3, 9])


class Toy:
    """Prediction [B, factor * C, H, W] that depends on x, t, the label and the channel; remembers what it was asked."""

    def __init__(self, factor: int = 2) -> None:
        self.factor, self.calls = factor, list[tuple[Tensor, Tensor, Tensor | None]]()

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        self.calls.append((x, t, cond))
        label = torch.zeros(len(x)) if cond is None else cond.float()
        channel = torch.arange(self.factor * x.shape[1]) + 1.0
        return x.repeat(1, self.factor, 1, 1) + t.view(-1, 1, 1, 1) / 1000 + label.view(-1, 1, 1, 1) * channel.view(-1, 1, 1)


def inputs(channels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(3, channels, 2, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 500, 999])


@pytest.mark.parametrize(
    ("channels", "available", "guided"), [("3", 4, 3), ("all", 4, 4), ("3", 1, 1), ("all", 1, 1), ("3", 3, 3)]
)
@pytest.mark.parametrize("factor", [1, 2])
def test_only_the_asked_channels_are_guided(channels: str, available: int, guided: int, factor: int) -> None:
    x, t = inputs(available)
    toy = Toy(factor)
    found = guide(toy, COND, NULL, 1.5, channels)(x, t)  # type: ignore[arg-type]
    conditional, null = Toy(factor)(x, t, COND), Toy(factor)(x, t, NULL.expand_as(COND))
    torch.testing.assert_close(found[:, :guided], (null + 1.5 * (conditional - null))[:, :guided])
    assert torch.equal(found[:, guided:], conditional[:, guided:])
    assert not torch.allclose(found[:, :guided], conditional[:, :guided])


def test_both_halves_share_one_forward() -> None:
    x, t = inputs(4)
    toy = Toy()
    guide(toy, COND, NULL, 4.0)(x, t)
    ((seen_x, seen_t, labels),) = toy.calls
    assert torch.equal(seen_x, torch.cat([x, x]))
    assert torch.equal(seen_t, torch.cat([t, t]))
    assert labels is not None
    assert labels.tolist() == [0, 3, 9, 10, 10, 10]


@pytest.mark.parametrize("cond", [COND, None])
def test_scale_one_is_no_guidance_and_no_second_half(cond: Tensor | None) -> None:
    x, t = inputs(4)
    toy = Toy()
    assert torch.equal(guide(toy, cond, None, 1.0)(x, t), Toy()(x, t, cond))
    assert [len(call[0]) for call in toy.calls] == [3]


def test_scale_zero_is_the_null_class() -> None:
    x, t = inputs(4)
    found = guide(Toy(), COND, NULL, 0.0, "all")(x, t)
    torch.testing.assert_close(found[:, :4], Toy()(x, t, NULL.expand_as(COND))[:, :4])


@pytest.mark.parametrize(("cond", "null"), [(None, None), (COND, None), (None, NULL)])
def test_an_unconditional_backbone_cannot_be_guided(cond: Tensor | None, null: Tensor | None) -> None:
    with pytest.raises(UsageError, match="needs a backbone with classes or captions"):
        guide(Toy(), cond, null, 1.5)
