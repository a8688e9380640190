import datasets
import pytest


@pytest.fixture(autouse=True)
def _arrow_in_tmp(tmp_path_factory, monkeypatch):
    """What `datasets` prepares stays out of the home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("arrow")))
