"""Statistics written as ADM, pytorch-fid, clean-fid, torch-fidelity and we write them; and files that are none."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from dmpctl.errors import IntegrityError, MissingError
from dmpctl.files import write_tensors
from dmpctl.metrics.frechet import moments_to_fid
from dmpctl.metrics.moments import FeatureMoments, features_to_moments
from dmpctl.metrics.statistics import protocol_of_name, read_statistics, write_statistics
from tests.helpers import Hostile

PICTURES = np.zeros((5, 4, 4, 3), np.uint8)


def features(count: int = 400, width: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, width, generator=torch.Generator().manual_seed(seed)).double()


def mu_sigma(x: Tensor, dtype: str = "float64") -> dict[str, np.ndarray]:
    return {"mu": x.mean(0).numpy().astype(dtype), "sigma": np.cov(x.numpy(), rowvar=False).astype(dtype)}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pytorch_fids_file_gives_the_distance_of_its_features(tmp_path, dtype):
    x, y = features(), features(seed=1) + 0.1
    np.savez_compressed(tmp_path / "fid_stats_mscoco256_val.npz", **mu_sigma(x, dtype))
    found = read_statistics(tmp_path / "fid_stats_mscoco256_val.npz", width=12)
    assert (found.kind, found.protocol, found.count, found.images, found.spatial) == ("pytorch-fid", None, None, 0, None)
    expected = moments_to_fid(features_to_moments([y]), features_to_moments([x]))
    assert moments_to_fid(features_to_moments([y]), found.features) == pytest.approx(
        expected, rel=1e-9 if dtype == "float64" else 1e-4
    )


def test_adms_reference_batch_has_images_and_spatial_statistics(tmp_path):
    x, s = features(), features(width=7, seed=2)
    spatial = {f"{name}_s": value for name, value in mu_sigma(s).items()}
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", PICTURES, **mu_sigma(x), **spatial)
    found = read_statistics(tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    assert (found.kind, found.protocol, found.images) == ("adm", "adm", 5)
    assert found.spatial is not None
    assert found.spatial.width == 7


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("ffhq_clean_trainval_256.npz", "clean"),
        ("cifar10_legacy_tensorflow_train_32.npz", "adm"),
        ("lsun_legacy_pytorch_train_256.npz", "pytorch-fid"),
        ("unclean.npz", None),
    ],
)
def test_a_clean_fid_name_states_its_protocol(tmp_path, name, protocol):
    np.savez_compressed(tmp_path / name, **mu_sigma(features()))
    found = read_statistics(tmp_path / name)
    assert found.protocol == protocol == protocol_of_name(name)
    assert found.kind == ("clean-fid" if protocol else "pytorch-fid")


def test_torch_fidelitys_cache_file(tmp_path):
    x = features()
    torch.save(fid_features_to_statistics(x), tmp_path / "x.pt")
    found = read_statistics(tmp_path / "x.pt")
    assert (found.kind, found.protocol) == ("torch-fidelity", "adm")
    assert moments_to_fid(features_to_moments([x]), found.features) < 1e-9


def test_our_own_file_comes_back_bit_for_bit(tmp_path):
    x, s = features_to_moments([features()]), features_to_moments([features(width=5)])
    about = {"protocol": "adm", "extractor": "e", "source": {"name": "digits"}}
    assert write_statistics(tmp_path / "a.safetensors", x, s, about) == write_statistics(tmp_path / "b.safetensors", x, s, about)
    found = read_statistics(tmp_path / "a.safetensors", width=12)
    assert (found.kind, found.protocol, found.count, found.about) == ("dmpctl", "adm", 400, about)
    for loaded, own in ((found.features, x), (found.spatial, s)):
        assert isinstance(loaded, FeatureMoments)
        assert loaded.count == own.count
        assert torch.equal(loaded.mean, own.mean)
        assert torch.equal(loaded.scatter, own.scatter)
    write_statistics(tmp_path / "c.safetensors", x, None, {})
    assert read_statistics(tmp_path / "c.safetensors").spatial is None


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.zeros(4)}, "do not fit together"),
        ({"sigma": np.eye(4)}, "do not fit together"),
        ({"mu": np.zeros((3, 1))}, "do not fit together"),
        ({"mu": np.array([0, np.nan, 0])}, "mu has numbers that are not finite"),
        ({"sigma": np.full((3, 3), np.inf)}, "sigma has numbers that are not finite"),
        ({"sigma": np.eye(3) + np.eye(3, k=1)}, "not symmetric"),
        ({"sigma": np.diag([1.0, 1.0, -0.5])}, "negative eigenvalue"),
        ({"mu": np.array(["a", "b", "c"])}, "real numbers"),
        ({"sigma": np.array([[None] * 3] * 3)}, "pickled objects"),
    ],
)
def test_a_malformed_npz_is_refused_in_one_sentence(tmp_path, change, message):
    np.savez(tmp_path / "x.npz", **GOOD)
    read_statistics(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", **{**GOOD, **change})
    with pytest.raises(IntegrityError, match=message) as refused:
        read_statistics(tmp_path / "x.npz")
    assert "\n" not in refused.value.message


def test_inceptions_averages_are_not_negative(tmp_path):
    mu = np.zeros(2048)
    mu[7] = -0.1
    np.savez(tmp_path / "x.npz", mu=mu, sigma=np.eye(2048))
    with pytest.raises(IntegrityError, match="negative numbers"):
        read_statistics(tmp_path / "x.npz")


def test_another_width_and_another_content_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", **GOOD)
    with pytest.raises(IntegrityError, match="3 features, 2048 are compared"):
        read_statistics(tmp_path / "x.npz", width=2048)
    np.savez(tmp_path / "y.npz", PICTURES)
    with pytest.raises(IntegrityError, match="no mu and sigma; it has arr_0"):
        read_statistics(tmp_path / "y.npz")
    with pytest.raises(MissingError):
        read_statistics(tmp_path / "none.npz")
    with pytest.raises(MissingError):
        read_statistics(tmp_path / "none.pt")
    with pytest.raises(MissingError):
        read_statistics(tmp_path / "none.safetensors")


def test_a_malicious_cache_file_runs_no_code(tmp_path):
    torch.save({"mu": Hostile(tmp_path / "ran"), "sigma": 1}, tmp_path / "x.pt")
    with pytest.raises(IntegrityError, match="not a readable statistics file"):
        read_statistics(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


OWN = {"count": torch.tensor(5), "mean": torch.zeros(3).double(), "scatter": torch.eye(3).double()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": torch.tensor(-1)}, "finite and symmetric"),
        ({"count": torch.tensor([5])}, "shape or dtype"),
        ({"count": torch.tensor(5.0)}, "shape or dtype"),
        ({"mean": torch.zeros(4).double()}, "shape or dtype"),
        ({"scatter": torch.eye(3)}, "shape or dtype"),
        ({"scatter": torch.eye(3).double() * float("nan")}, "finite and symmetric"),
        ({"scatter": torch.eye(3).double().cumsum(0)}, "finite and symmetric"),
        ({"scatter": -torch.eye(3).double()}, "negative variance"),
        ({"extra": torch.zeros(1)}, "does not hold"),
        ({"spatial.count": torch.tensor(5)}, "does not hold"),
    ],
)
def test_our_own_format_is_checked(tmp_path, change, message):
    path = tmp_path / "moments.safetensors"
    write_tensors(path, OWN, {"schema_version": "1"})
    read_statistics(path)
    write_tensors(path, {**OWN, **change}, {"schema_version": "1"})
    with pytest.raises(IntegrityError, match=message):
        read_statistics(path)


def test_our_own_file_without_its_number_of_images_is_refused(tmp_path):
    write_tensors(tmp_path / "m.safetensors", {key: OWN[key] for key in ("mean", "scatter")}, {"schema_version": "1"})
    with pytest.raises(IntegrityError, match="does not hold feature moments"):
        read_statistics(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("version", "message"), [("2", "schema_version 2"), ("", "does not hold"), ("x", "does not hold")])
def test_a_newer_or_absent_schema_is_refused(tmp_path, version, message):
    write_tensors(tmp_path / "m.safetensors", OWN, {"schema_version": version})
    with pytest.raises(IntegrityError, match=message):
        read_statistics(tmp_path / "m.safetensors")


def test_a_truncated_file_is_corrupt(tmp_path):
    path = tmp_path / "m.safetensors"
    write_statistics(path, features_to_moments([features()]), None, {})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(IntegrityError):
        read_statistics(path)
