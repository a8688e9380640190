import pytest
import torch
from scipy import stats

from dmpctl.codecs.identity import Identity
from dmpctl.comparing.paired_loss import epsilon_errors, loss_difference
from dmpctl.data.bundled import Digits
from dmpctl.diffusion.schedule import NoiseSchedule
from dmpctl.models.patch_files import load_patch, load_result
from dmpctl.models.patched import Patched
from dmpctl.rng import seed_of
from dmpctl.types import Silent

CPU = torch.device("cpu")


class Few:
    """The first images of a source."""

    def __init__(self, count: int) -> None:
        self.source, self.count = Digits(), count

    def __len__(self) -> int:
        return self.count

    def item(self, index: int):
        return self.source.item(index)


def test_a_patch_that_does_nothing_differs_by_exactly_nothing(finished):
    model = load_patch(finished)
    torch.nn.init.zeros_(model.patch.prompt_embeddings)
    before, steps = epsilon_errors(model.unpatched(), Few(40), CPU, 0, Silent())
    after, _ = epsilon_errors(model, Few(40), CPU, 0, Silent())
    assert torch.equal(before, after)
    found = loss_difference(before, after, steps)
    assert (found.difference, found.standard_error, set(found.bands)) == (0.0, 0.0, {0.0})
    assert found.backbone == found.patched > 0


def test_errors_are_the_plain_formula(finished):
    model = load_patch(finished)
    errors, steps = epsilon_errors(model, Few(3), CPU, 5, Silent(), batch=2)
    assert errors.shape == (25, 3)
    assert steps == sorted(steps)
    assert (len(set(steps)), steps[0] > 0, steps[-1] < 999) == (25, True, True)
    row = 12
    images = torch.stack([Few(3).item(k)[0] for k in range(3)])
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(seed_of(5, "paired", steps[row])))
    t = torch.full((3,), steps[row])
    abar = NoiseSchedule.from_spec(model.backbone.spec.schedule).alphas_cumprod[steps[row]]
    x_t = (abar**0.5 * Identity().encode(images).mean + (1 - abar) ** 0.5 * noise).float()
    with torch.no_grad():
        eps = model.predict(x_t, t, None)[:, :1]
    expected = ((eps - noise) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(errors[row], expected.double(), rtol=1e-5, atol=1e-8)


def test_the_batch_does_not_matter_and_the_seed_does(finished):
    model = load_patch(finished)
    whole, _ = epsilon_errors(model, Few(10), CPU, 0, Silent())
    parts, _ = epsilon_errors(model, Few(10), CPU, 0, Silent(), batch=3)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-8)
    other, _ = epsilon_errors(model, Few(10), CPU, 1, Silent())
    assert not torch.allclose(whole, other)


def test_labels_reach_a_conditional_backbone(conditional):
    model = load_result(conditional)
    found, _ = epsilon_errors(model, Few(6), CPU, 0, Silent())
    null = Patched(model.backbone)
    without = null.predict(torch.zeros(1, 1, 8, 8), torch.tensor([5]), torch.tensor([10]))
    labelled = null.predict(torch.zeros(1, 1, 8, 8), torch.tensor([5]), torch.tensor([3]))
    assert not torch.equal(without, labelled)
    assert found.isfinite().all()


def test_at_most_so_many_images(finished):
    assert epsilon_errors(load_patch(finished), Few(9), CPU, 0, Silent(), most=4)[0].shape == (25, 4)


def test_the_difference_and_its_error():
    draw = torch.Generator().manual_seed(0)
    before, after = (
        torch.rand(25, 60, generator=draw, dtype=torch.float64),
        torch.rand(25, 60, generator=draw, dtype=torch.float64),
    )
    found = loss_difference(before, after, list(range(25)))
    expected = stats.ttest_rel(after.mean(0).numpy(), before.mean(0).numpy())
    assert found.difference / found.standard_error == pytest.approx(expected.statistic)
    assert found.difference == pytest.approx(found.patched - found.backbone)
    assert sum(found.bands) / 25 == pytest.approx(found.difference)
    assert (found.images, len(found.timesteps)) == (60, 25)
