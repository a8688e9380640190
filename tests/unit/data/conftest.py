import pytest


@pytest.fixture(autouse=True)
def _arrow(arrow_in_tmp):
    """Nothing is prepared in the home."""
