from pathlib import Path

import pytest
import torch

from dmpctl.errors import UsageError
from dmpctl.processes.accelerator import accelerator_for
from dmpctl.processes.command import again_command
from dmpctl.processes.launcher import processes_to_start
from dmpctl.processes.notes import Assignment
from dmpctl.processes.ranks import VARIABLES, own_device, resolve_device
from tests.helpers import settings_for


@pytest.fixture
def gpus(monkeypatch):
    """Call it with how many GPUs this machine is to have."""

    def there(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return there


@pytest.mark.parametrize(
    ("given", "found", "expected"),
    [
        ({}, 0, 0),
        ({}, 1, 0),
        ({}, 8, 8),
        ({"device": "cuda"}, 8, 8),
        ({"device": "cuda:3"}, 8, 0),
        ({"cpu": True}, 8, 0),
        ({"cpu": True, "num_processes": 2}, 8, 2),
        ({"num_processes": 1}, 8, 0),
        ({"num_processes": 3}, 8, 3),
        ({"num_processes": 1, "nnodes": "2", "rdzv_endpoint": "a:1"}, 8, 1),
        ({"nnodes": "1:4", "rdzv_endpoint": "a:1"}, 0, 1),
    ],
)
def test_one_process_for_each_gpu_unless_it_says_otherwise(monkeypatch, gpus, given, found, expected):
    gpus(found)
    launch = settings_for("patch", **given).launch
    assert processes_to_start(launch) == expected
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")
    assert processes_to_start(launch) == 0  # somebody else has started this one


def test_a_rank_has_a_gpu_of_its_own_or_says_that_there_is_none(monkeypatch, gpus):
    chosen = []
    gpus(2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device(settings_for("patch").launch) == torch.device("cuda", 1) == chosen[0]
    assert own_device(settings_for("patch", cpu=True).launch) == torch.device("cpu")
    with pytest.raises(UsageError, match="--device cuda:1 is one device"):
        own_device(settings_for("patch", device="cuda:1").launch)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="process 3 of this machine has no GPU: there are 2"):
        own_device(settings_for("patch").launch)


def test_what_is_left_for_other_processes_is_what_was_asked_for(tmp_path):
    for argument in (None, "runs/x", Path("runs/x"), ["a", "b"]):
        left = Assignment("fid", settings_for("fid", metrics="fid,kid", cpu=True), argument, ["dmpctl", "fid", "x"])
        left.write(tmp_path)
        found = Assignment.read(tmp_path)
        assert found == left
        assert type(found.argument) is type(argument) or isinstance(argument, Path)


def test_devices(gpus):
    gpus(0)
    for given in ({}, {"device": "cpu"}, {"cpu": True}):
        assert resolve_device(settings_for("patch", **given).launch) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"--device cuda:1 is not there \(0 found\)"):
        resolve_device(settings_for("patch", device="cuda:1").launch)
    gpus(2)
    assert resolve_device(settings_for("patch", device="cuda:1").launch) == torch.device("cuda:1")
    assert resolve_device(settings_for("patch").launch) == torch.device("cuda")


def test_half_precision_on_a_cpu_is_a_sentence():
    with pytest.raises(UsageError, match="--precision fp16"):
        accelerator_for(settings_for("patch", precision="fp16", cpu=True))


def test_the_command_that_goes_on_is_the_one_that_was_typed(typed):
    typed("/bin/dmpctl", "patch", "--run", "my run")
    assert again_command() == "dmpctl patch --run 'my run'"
