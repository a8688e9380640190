"""Random Inception weights, written once for all tests here."""

from pathlib import Path

import pytest

from tests.random_inception import write_random_inception


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("inception") / "random.pth")
