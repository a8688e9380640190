"""examples/ci-pipeline.sh: what a pipeline makes of the exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import environment

SCRIPT = Path(__file__).parents[2] / "examples" / "ci-pipeline.sh"
SMALL = {"PATCH_OPTIONS": "--iters 3 --batch-size 8 --cpu", "FID_OPTIONS": "--max-images 70 --sampler ddim --steps 2 --cpu"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(("limit", "code"), [("1000", 0), ("0.0001", 6)])
def test_a_pipeline_acts_on_the_answer(tmp_path, limit, code):
    env = environment() | SMALL | {"DMPCTL": f"{sys.executable} -m dmpctl", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([str(SCRIPT), "run", limit], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stderr
    record = json.loads((tmp_path / "run" / "fid.json").read_text())
    assert bool(record["failed"]) == (code == 6)
    assert record["versus"]["what"] == "run without its patch"
    assert (tmp_path / "run" / "report.html").is_file()
    assert f"the distance is {'above' if code else 'at most'} {limit}" in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_what_is_missing_is_found_first(tmp_path):
    env = environment() | SMALL | {"DMPCTL": f"{sys.executable} -m dmpctl", "DMPCTL_BASE": "DiT-XL/2", "DMPCTL_DATA": "nowhere"}
    done = subprocess.run([str(SCRIPT), "run"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
    assert os.listdir(tmp_path) == []
