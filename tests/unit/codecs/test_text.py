"""Encoders of captions, tiny ones with random weights, against transformers' own."""

import json

import pytest
import torch

from dmpctl.batches.caption_states import CaptionNumbers
from dmpctl.codecs.text import TextEncoder
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.rng import seed_of
from tests.foreign_helpers import TOKENS, WIDTH, tiny_clip, tiny_t5

CAPTIONS = ["a cat", "", "\U0001f600\U0001f431", "x" * 10_000, "Ünïcode, and\nlines"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return tiny_t5(tmp_path_factory.mktemp("t5"))


def test_clips_states_are_those_of_stable_diffusion(clip):
    """As diffusers' pipeline takes them: 77 tokens, the last layer after its norm, no mask."""
    from transformers import CLIPTextModel, CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(clip / "tokenizer")
    ids = words(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    expected = CLIPTextModel.from_pretrained(clip / "text_encoder").eval()(ids)[0]
    states, mask = TextEncoder(clip, "tiny")(CAPTIONS)
    assert torch.equal(states, expected)
    assert (states.shape, states.dtype, mask.dtype) == ((5, TOKENS, WIDTH), torch.float32, torch.bool)
    assert mask.sum(1)[[1, 3]].tolist() == [2, TOKENS]  # begin and end; cut


def test_t5_does_not_see_padding(t5):
    encoder = TextEncoder(t5, "t5")
    assert (encoder.max_length, encoder.width) == (120, 24)
    states, mask = encoder(CAPTIONS)
    short, _ = TextEncoder(t5, "t5", tokens=8)(CAPTIONS[:2])
    count = int(mask[0].sum())
    torch.testing.assert_close(short[0, :count], states[0, :count], rtol=0, atol=1e-5)
    assert mask.sum(1).tolist()[1] == 1
    assert states.isfinite().all()


@pytest.mark.parametrize("which", ["clip", "t5"])
def test_a_caption_has_its_states_in_any_batch(which, request):
    encoder = TextEncoder(request.getfixturevalue(which), which)
    states, mask = encoder(CAPTIONS)
    for number, caption in enumerate(CAPTIONS):
        one, own = encoder([caption])
        torch.testing.assert_close(one[0], states[number], rtol=0, atol=1e-5)
        assert torch.equal(own[0], mask[number])


def test_its_identity_is_its_weights_and_its_words(clip, tmp_path):
    one = TextEncoder(clip, "here").revision
    assert TextEncoder(tiny_clip(tmp_path / "same"), "there").revision == one
    assert TextEncoder(tiny_clip(tmp_path / "other", seed=1), "here").revision != one
    words = tmp_path / "same" / "tokenizer" / "tokenizer_config.json"
    words.write_text(words.read_text() + " ")
    assert TextEncoder(tmp_path / "same", "here").revision != one


def test_what_is_no_text_encoder_is_said(clip, tmp_path):
    with pytest.raises(MissingError, match=r"config\.json is not there"):
        TextEncoder(tmp_path, "none")
    with pytest.raises(UsageError, match="at most 77 tokens, --text-tokens says 78"):
        TextEncoder(clip, "tiny", tokens=78)
    broken = tiny_clip(tmp_path / "broken")
    config = json.loads((broken / "text_encoder" / "config.json").read_text())
    (broken / "text_encoder" / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(UsageError, match="holds a model of type bert"):
        TextEncoder(broken, "broken")
    (broken / "text_encoder" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(IntegrityError, match="it lacks"):
        TextEncoder(broken, "broken")(["a"])
    (broken / "text_encoder" / "config.json").write_text(json.dumps(config))
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(IntegrityError, match="is no text encoder that can be read"):
        TextEncoder(broken, "broken")(["a"])


def test_each_image_has_one_of_its_captions_in_each_epoch():
    numbers = CaptionNumbers([2, 0, 3], seed=5)
    epochs, images = torch.arange(60) // 3, torch.arange(60) % 3
    found = numbers.at(epochs, images)
    assert set(found[images == 0].tolist()) == {0, 1}
    assert set(found[images == 1].tolist()) == {5}  # the null caption's
    assert set(found[images == 2].tolist()) == {2, 3, 4}
    assert int(numbers.at(torch.tensor([7]), torch.tensor([2]))) == 2 + seed_of(5, "caption", 7, 2) % 3
