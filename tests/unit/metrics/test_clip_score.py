"""CLIP score against torchmetrics, on a tiny CLIP with random weights."""

import pytest
import torch
from torchmetrics.functional.multimodal import clip_score

from dmpctl.errors import IntegrityError
from dmpctl.metrics.clip_score import ClipScorer, scores_to_clip_score
from tests.foreign_helpers import tiny_clip_model

CAPTIONS = ["a cat", "", "three dogs on a bench", "\U0001f600 smile", "far too long " * 100]


class Pooled:
    """A model of transformers as torchmetrics expects it: features as tensors, which newer ones wrap."""

    def __init__(self, model):
        self._model, self.config = model, model.config

    def to(self, device):
        return self

    def get_image_features(self, pixels):
        found = self._model.get_image_features(pixels)
        return found if isinstance(found, torch.Tensor) else found.pooler_output

    def get_text_features(self, ids, mask):
        found = self._model.get_text_features(ids, mask)
        return found if isinstance(found, torch.Tensor) else found.pooler_output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images():
    return torch.randint(256, (len(CAPTIONS), 3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_it_is_that_of_torchmetrics(folder, images):
    from transformers import AutoProcessor, CLIPModel

    model, processor = Pooled(CLIPModel.from_pretrained(folder)), AutoProcessor.from_pretrained(folder)
    scorer = ClipScorer(folder)
    for image, caption in zip(images[:4], CAPTIONS[:4], strict=True):
        expected = clip_score(image, caption, lambda: (model, processor))
        found = scores_to_clip_score([scorer(image[None], [caption])])
        assert found.value == pytest.approx(float(expected), abs=1e-3)


def test_an_image_has_its_score_in_any_batch(folder, images):
    scorer = ClipScorer(folder)
    together = scorer(images, CAPTIONS)
    assert together.isfinite().all()
    for k in range(len(CAPTIONS)):
        torch.testing.assert_close(scorer(images[k : k + 1], CAPTIONS[k : k + 1]), together[k : k + 1], rtol=0, atol=1e-4)


def test_mean_and_its_error():
    found = scores_to_clip_score([torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
    assert (found.value, found.n) == (3.0, 3)
    assert found.standard_error == pytest.approx(torch.tensor([1.0, 2.0, 6.0]).std().item() / 3**0.5)
    assert scores_to_clip_score([torch.tensor([-4.0])]).value == 0
    assert scores_to_clip_score([torch.tensor([4.0])]).standard_error is None


def test_what_is_no_clip_is_said(tmp_path):
    with pytest.raises(IntegrityError, match="is no CLIP that can be read"):
        ClipScorer(tmp_path)
