"""Random Inception weights under a short name."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def weights(random_inception) -> Path:
    return random_inception
