"""References: what a name stands for, and what is kept of it."""

import numpy as np
import pytest
import torch

from dmpctl.data.bundled import Digits
from dmpctl.measuring.image_sets import ImageSet
from dmpctl.measuring.reference import find_reference, open_reference
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.moments import features_to_moments
from dmpctl.processes.command import Command
from dmpctl.store.cache import cache_dir
from dmpctl.types import Silent
from tests.helpers import settings_for


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))


def opened(name, shape=(1, 8, 8), protocol="pixels", **given):
    command, extractor = Command.alone(settings_for("fid", cpu=True, **given), Silent()), Pixels(*shape[:2])
    found = find_reference(str(name), ImageSet("images", shape, 0, lambda _: (), {}), pixels=True, command=command)
    if isinstance(found, ImageSet):
        found = found.with_channels(shape[0])
    return found, open_reference(found, shape, extractor, protocol, command)


def test_a_source_an_npz_of_images_and_statistics(tmp_path):
    images = Digits(channels=3).images()[:300].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "images.npz", images)
    x = Pixels(1, 8)(Digits().images()).double()
    np.savez(tmp_path / "stats.npz", mu=x.mean(0).numpy(), sigma=torch.cov(x.T).numpy())
    source, of_source = opened("digits")
    pictures, of_pictures = opened(tmp_path / "images.npz", (3, 8, 8))
    file, of_file = opened(tmp_path / "stats.npz")
    assert isinstance(source, ImageSet)
    assert isinstance(pictures, ImageSet)
    assert file == tmp_path / "stats.npz"
    assert (of_source.count, of_pictures.count, of_file.count) == (1797, 300, None)
    torch.testing.assert_close(of_file.features.mean, of_source.features.mean)
    assert of_source.record.fingerprint == Digits().fingerprint


def test_features_are_kept_only_where_a_metric_wants_them(tmp_path):
    opened("digits")
    assert not list((cache_dir() / "features").iterdir())
    assert len(list((cache_dir() / "statistics").iterdir())) == 1
    _, reference = opened("digits", metrics="kid")
    vectors = reference.vectors()
    assert vectors.shape == (1797, 64)
    found = features_to_moments([vectors])
    torch.testing.assert_close(found.mean, reference.features.mean)
    assert len(list((cache_dir() / "statistics").iterdir())) == 1


def test_an_adm_batch_gives_its_own_images_to_precision_and_recall(tmp_path):
    images = Digits(channels=3).images()[:100].permute(0, 2, 3, 1).numpy()
    x = Pixels(3, 8)(Digits(channels=3).images()).double()
    np.savez(tmp_path / "batch.npz", images, mu=x.mean(0).numpy(), sigma=torch.cov(x.T).numpy())
    _, reference = opened(tmp_path / "batch.npz", (3, 8, 8), metrics="pr", protocol="adm")
    assert reference.vectors().shape == (100, 192)
