"""What doctor finds agrees with what is there."""

import json
import os
import sys
from importlib import metadata
from pathlib import Path

import torch

from dmpctl.reports.doctor import examine
from dmpctl.settings.model import Settings
from dmpctl.settings.sections import Console
from dmpctl.types import Silent


def test_versions_devices_threads_and_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = examine(Settings(), Silent()).data
    assert data["python"] == sys.version.split()[0]
    assert data["versions"]["torch"] == metadata.version("torch") == torch.__version__.split("+")[0]
    assert data["threads"] == {"cores": os.cpu_count(), "usable": len(os.sched_getaffinity(0)), "torch": torch.get_num_threads()}
    assert data["devices"][0]["device"] == "cpu"
    assert sum(device["device"].startswith("cuda") for device in data["devices"]) == torch.cuda.device_count()
    places = {folder["what"]: folder for folder in data["folders"]}
    assert Path(places["dmpctl cache"]["path"]) == tmp_path / "cache" / "dmpctl"
    assert places["dmpctl cache"]["exists"] is False
    assert places["working directory"]["free_gib"] > 0
    assert list(tmp_path.iterdir()) == []


def test_it_is_json_and_says_whether_we_are_offline():
    for offline in (True, False):
        report = examine(Settings(console=Console(offline=offline)), Silent())
        assert json.loads(json.dumps(report.data))["offline"] is offline
        assert {"what": "offline", "found": "yes" if offline else "no"} in report.table


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr("dmpctl.reports.doctor.PACKAGES", ("torch", "no-such-package"))
    report = examine(Settings(), Silent())
    assert report.data["versions"]["no-such-package"] == "not installed"
    assert "not installed: no-such-package" in report.lines


def test_a_torch_that_does_not_import_is_a_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    report = examine(Settings(), Silent())
    assert report.data["devices"] == []
    assert any(line.startswith("torch does not import") for line in report.lines)
