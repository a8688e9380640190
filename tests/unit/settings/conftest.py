import os

import pytest


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DMPCTL_")] + ["HF_HUB_OFFLINE"]:
        monkeypatch.delenv(name, raising=False)
