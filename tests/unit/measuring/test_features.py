"""Features on disk: resumed, shared by ranks, refused where they are not finite, and never in memory as a whole."""

from itertools import chain

import numpy as np
import pytest
import torch

from dmpctl.errors import NumericalError, UsageError
from dmpctl.measuring.features import FeatureStore
from dmpctl.types import Outputs
from tests.helpers import largest_file

KEY = {"images": "a", "extractor": "e"}


def pictures(indices):
    return torch.tensor([[[[k % 251]]] for k in indices], dtype=torch.uint8)


def outputs(indices):
    x = torch.tensor([[float(k), float(k) ** 0.5] for k in indices])
    return Outputs(x, logits=x + 1, spatial=x.repeat(1, 2))


def put(store, indices):
    store.put(indices, pictures(indices), outputs(indices))


def test_a_store_goes_on_where_it_was(tmp_path):
    store = FeatureStore(tmp_path, KEY, 10)
    put(store, [0, 1, 7])
    again = FeatureStore(tmp_path, KEY, 10)
    assert again.missing() == [2, 3, 4, 5, 6, 8, 9]
    put(again, again.missing())
    assert again.missing() == []
    assert torch.equal(again.features, outputs(range(10)).features)
    assert torch.equal(FeatureStore(tmp_path, KEY, 10).features, again.features)


def test_ranks_fill_rows_of_their_own(tmp_path):
    stores = [FeatureStore(tmp_path, KEY, 11) for _ in range(3)]
    shares = [store.missing(rank, 3) for rank, store in enumerate(stores)]
    assert sorted(chain.from_iterable(shares)) == list(range(11))
    for store, share in zip(stores, shares, strict=True):
        put(store, share)
    assert torch.equal(FeatureStore(tmp_path, KEY, 11).features, outputs(range(11)).features)


def test_other_images_another_extractor_or_another_count_are_another_store(tmp_path):
    folders = {
        FeatureStore(tmp_path, KEY, 3).folder,
        FeatureStore(tmp_path, {**KEY, "extractor": "f"}, 3).folder,
        FeatureStore(tmp_path, KEY, 4).folder,
        FeatureStore(tmp_path, KEY, 3, ("logits",)).folder,
    }
    assert len(folders) == 4


def test_logits_and_spatial_features_are_kept_where_they_are_asked_for(tmp_path):
    store = FeatureStore(tmp_path, KEY, 3, ("logits", "spatial"))
    put(store, [0, 1, 2])
    assert torch.equal(store.logits, outputs(range(3)).logits)
    assert store.spatial.shape == (3, 4)
    plain = FeatureStore(tmp_path, KEY, 3)
    put(plain, [0])
    assert {path.name for path in plain.folder.iterdir()} == {"key.json", "seals.npy", "hashes.npy", "features.npy"}


def test_copies_are_counted(tmp_path):
    store = FeatureStore(tmp_path, KEY, 4)
    x = pictures([1, 2, 1, 1])
    store.put([0, 1, 2, 3], x, outputs(range(4)))
    assert store.duplicates == 2


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    store = FeatureStore(tmp_path, KEY, 4)
    with pytest.raises(NumericalError, match="images 2 to 3"):
        store.put([2, 3], pictures([2, 3]), Outputs(torch.tensor([[0.0], [torch.nan]])))
    assert store.missing() == [0, 1, 2, 3]


def test_a_store_whose_beginning_was_cut_off_begins_anew(tmp_path):
    store = FeatureStore(tmp_path, KEY, 4)
    put(store, [0, 1])
    (store.folder / "key.json").unlink()
    assert FeatureStore(tmp_path, KEY, 4).missing() == [0, 1, 2, 3]


def test_a_full_disk_is_a_sentence_and_not_a_dead_process(tmp_path):
    """A hole in a memory map on a full disk is SIGBUS later: its place is taken while that can still be said."""
    with largest_file(10), pytest.raises(UsageError, match="File too large"):
        FeatureStore(tmp_path, KEY, 4)


def test_features_are_a_memory_map(tmp_path):
    store = FeatureStore(tmp_path, KEY, 5)
    put(store, range(5))
    assert isinstance(store._map("features"), np.memmap)
    assert store.features.data_ptr() == store._map("features").ctypes.data
    store.remove()
    assert not store.folder.exists()
