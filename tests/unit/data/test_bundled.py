import pytest
import torch
from sklearn.datasets import load_digits

from dmpctl.data.bundled import Digits
from dmpctl.errors import UsageError


def test_they_are_the_digits_of_scikit_learn():
    digits, other = Digits(), load_digits()
    exact = other.images * 255 / 16
    assert digits.images().shape == (1797, 1, 8, 8)
    assert digits.images().dtype == torch.uint8
    assert (digits.images()[:, 0].double() - torch.from_numpy(exact)).abs().max() <= 0.5
    assert digits.images().min() == 0
    assert digits.images().max() == 255
    assert len(digits.images().unique()) == 17
    assert digits.labels().tolist() == other.target.tolist()


def test_the_bytes_are_the_ones_that_patches_were_trained_on():
    assert Digits().fingerprint == "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"


def test_no_other_size():
    assert len(Digits(8)) == 1797
    with pytest.raises(UsageError, match="8x8 pixels only, not at 32x32") as caught:
        Digits(32)
    assert caught.value.exit_code == 2
    assert "--size 8" in str(caught.value.hint)


def test_three_channels_repeat_the_grey_one():
    grey, colour = Digits(), Digits(channels=3)
    assert colour.images().shape == (1797, 3, 8, 8)
    assert (colour.images() == grey.images()).all()
    assert colour.fingerprint != grey.fingerprint


def test_digits_are_not_mirrored():
    assert not Digits().mirror
