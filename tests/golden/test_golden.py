"""The package against the golden pairs; and the checker itself, which must be able to fail."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.diffusion.schedule import NoiseSchedule
from dmpctl.methods.dmp import DmpPatch, DmpShape
from dmpctl.settings.methods import Dmp
from dmpctl.types import ScheduleSpec

from .__main__ import main
from .check import INPUTS, OUTPUTS, RESPACED, TENSORS, WEIGHTS, Finding, Golden, check_directory, kept_of, pairs_in

HERE = Path(__file__).parent
PAIRS, HALVES = pairs_in(HERE)
TOPK = "class-topk"


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a safetensors file with its metadata kept."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata)


def edit_config(path: Path, **changes: object) -> None:
    length = int.from_bytes(path.read_bytes()[:8], "little")
    config = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["config"])
    save_file({name: value.clone() for name, value in load_file(path).items()}, path, {"config": json.dumps(config | changes)})


@pytest.fixture
def copied(tmp_path) -> Path:
    """A directory with one good pair in it."""
    for suffix in (WEIGHTS, TENSORS):
        shutil.copy(HERE / (TOPK + suffix), tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(HERE, TOPK)


def test_there_are_pairs():
    assert len(PAIRS) >= 2
    assert not HALVES


@pytest.mark.parametrize("name", PAIRS)
def test_the_package_agrees_with_the_published_code(name):
    found = list(Golden(HERE, name).findings())
    assert not [str(finding) for finding in found if not (isinstance(finding, Finding) and finding.good)]
    expected = set(load_file(HERE / (name + TENSORS))) - set(INPUTS)
    assert {finding.name for finding in found} == expected


def test_every_known_output_is_in_some_pair():
    held = {name for pair in PAIRS for name in load_file(HERE / (pair + TENSORS))}
    assert set(OUTPUTS) | set(INPUTS) == held


def test_the_directory_passes():
    lines, code = check_directory(HERE)
    assert code == 0, "\n".join(lines)
    assert sum(line.startswith("  ok") for line in lines) == 19 + 18 + 5


@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_ten_tolerances_off_in_one_number_is_a_failure_of_that_tensor_alone(golden, name):
    way = golden.way(name)
    assert way is not None
    scale, compute = way
    kept = golden.tensors[name]
    bent = kept.clone()
    spread = float(kept.double().std(correction=0))
    unit = {"absolute": 1.0, "relative": float(kept.reshape(-1)[-1]), "of its standard deviation": spread}
    bent.view(-1)[-1] += 10 * scale.tolerance * unit[scale.unit] if scale.tolerance else 1
    golden.tensors[name] = bent
    try:
        with torch.inference_mode():
            finding = golden._finding(name, scale, compute)
    finally:
        golden.tensors[name] = kept
    assert not finding.good
    assert 5 * scale.tolerance < finding.worst < math.inf
    assert str(finding).startswith(f"  FAIL {name}")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_agrees(copied, bad):
    def spoil(tensors):
        tensors["dmp_out"][0, 0, 0, 0] = bad

    edit_tensors(copied / (TOPK + TENSORS), spoil)
    lines, code = check_directory(copied)
    assert code == 1
    assert [line.split()[1] for line in lines if "FAIL" in line] == ["dmp_out"]


@pytest.mark.parametrize("key", ["prompt_embeddings", "gate.weight", "blocks.2.mlp.fc2.bias"])
def test_bent_weights_are_a_failure_of_what_they_feed(copied, key):
    def bend(weights):
        weights[key].view(-1)[::3] += 0.1

    edit_tensors(copied / (TOPK + WEIGHTS), bend)
    lines, code = check_directory(copied)
    assert code == 1
    failed = {line.split()[1] for line in lines if "FAIL" in line}
    assert "dmp_out" in failed
    assert ("base_out" in failed) == key.startswith("blocks.")
    assert ("gates" in failed) == key.startswith("gate.")
    assert not failed & {"linear.betas", "linear.x_t", "sample.timesteps"}


def test_gate_noise_has_no_part_in_the_golden_numbers(copied):
    edit_tensors(copied / (TOPK + WEIGHTS), lambda weights: weights["w_noise"].add_(1))
    assert check_directory(copied)[1] == 0


@pytest.mark.parametrize("changes", [{"num_heads": 8}, {"topk": 0.4375}, {"num_classes": 9}])
def test_another_config_is_a_failure(copied, changes):
    """One class fewer takes the last class for the null class: only guidance can tell."""
    edit_config(copied / (TOPK + WEIGHTS), **changes)
    lines, code = check_directory(copied)
    assert code == 1, "\n".join(lines)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_depth": 1},
        {"hidden_size": 32},
        {"num_prompts": 8},
        {"patch_size": 4},
        {"topk": "all"},
    ],
)
def test_weights_that_do_not_fit_their_config_are_a_failure_not_a_crash(copied, changes):
    edit_config(copied / (TOPK + WEIGHTS), **changes)
    lines, code = check_directory(copied)
    assert code == 1
    assert lines[1].startswith("  FAIL")


def test_a_pair_without_config_is_a_failure(copied):
    save_file(load_file(copied / (TOPK + WEIGHTS)), copied / (TOPK + WEIGHTS))
    assert check_directory(copied)[1] == 1


def test_absent_tensors_are_skipped_and_named(copied):
    edit_tensors(copied / (TOPK + TENSORS), lambda tensors: [tensors.pop(name) for name in ("cfg_out", "noise")])
    lines, code = check_directory(copied)
    assert code == 0
    skipped = {line.split()[1] for line in lines if "skip" in line}
    needing_noise = {f"{kind}.{what}" for kind in ("linear", "cosine") for what in ("x_t", "mse", "vb", "mse_min_snr_5")}
    assert skipped == {"cfg_out"} | needing_noise


def test_an_unknown_tensor_is_named(copied):
    edit_tensors(copied / (TOPK + TENSORS), lambda tensors: tensors.update(surprise=torch.zeros(1)))
    lines, code = check_directory(copied)
    assert code == 0
    assert any("skip surprise" in line for line in lines)


@pytest.mark.parametrize("kept", [INPUTS, ()])
def test_a_pair_with_nothing_to_check_is_a_failure(copied, kept):
    def keep(tensors):
        for name in [name for name in tensors if name not in kept]:
            del tensors[name]
        tensors["more"] = torch.zeros(1)

    edit_tensors(copied / (TOPK + TENSORS), keep)
    lines, code = check_directory(copied)
    assert code == 1
    assert "  FAIL it holds no tensor that can be checked" in lines


@pytest.mark.parametrize("suffix", [WEIGHTS, TENSORS])
def test_a_damaged_file_is_a_failure(copied, suffix):
    path = copied / (TOPK + suffix)
    path.write_bytes(path.read_bytes()[:-100])
    assert check_directory(copied)[1] == 1


@pytest.mark.parametrize("suffix", [WEIGHTS, TENSORS])
def test_half_a_pair_beside_a_pair_is_a_failure_and_alone_is_no_pair(copied, suffix):
    shutil.copy(copied / (TOPK + suffix), copied / f"other{suffix}")
    lines, code = check_directory(copied)
    assert code == 1
    assert "is missing" in "\n".join(lines)
    for name in (WEIGHTS, TENSORS):
        (copied / (TOPK + name)).unlink()
    assert check_directory(copied)[1] == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"10": [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]}', 0),
        ('{"2": [0, 998]}', 1),
        ("{}", 1),
        ("[", 1),
        ('{"a": []}', 1),
    ],
)
def test_respaced_timesteps_are_checked_where_they_are_there(copied, content, expected):
    (copied / RESPACED).write_text(content)
    lines, code = check_directory(copied)
    assert code == expected
    assert RESPACED in lines


def test_more_noise_than_was_recorded_is_a_failure(copied):
    name = "sample.noises"
    edit_tensors(copied / (TOPK + TENSORS), lambda tensors: tensors.update({name: tensors[name][:8].clone()}))
    lines, code = check_directory(copied)
    assert code == 1
    assert any("FAIL sample.ddpm10" in line and "more noise" in line for line in lines)


@pytest.mark.parametrize(
    ("fraction", "prompts", "kept", "expected"),
    [
        (0.5, 16, None, 8),
        (1.0, 9, None, 9),
        (0.29, 100, None, 29),
        (0.25, 9, None, 2),
        (0.3, 9, 2, 2),
        (0.3, 9, 3, 3),
        (0.01, 16, 1, 1),
    ],
)
def test_topk_is_a_fraction_and_the_gates_say_how_it_was_rounded(fraction, prompts, kept, expected):
    gates = None if kept is None else (torch.arange(prompts) < kept).float().expand(2, 3, prompts) / kept
    assert kept_of(fraction, prompts, gates) == expected


@pytest.mark.parametrize("uncond", [True, False])
def test_other_sizes_heads_classes_channels_and_fractions_work(tmp_path, uncond):
    """A made pair: what it proves is that no size of the two real pairs is built in."""
    classes = 0 if uncond else 7
    backbone = DiT(DiTConfig(12, 3, 4, 48, 2, 3, classes, learned_sigma=False))
    patch = DmpPatch(DmpShape(1, 9, 48, 3), Dmp(gate="topk", topk=3))
    draw = torch.Generator().manual_seed(0)
    for tensor in (*backbone.parameters(), *patch.parameters()):
        torch.nn.init.normal_(tensor, std=0.2, generator=draw)
    about = {"input_size": 12, "patch_size": 4, "hidden_size": 48, "depth": 2, "num_heads": 3, "uncond": uncond}
    about |= {"num_classes": classes or 1, "topk": 1 / 3, "prompt_depth": 1, "num_prompts": 9}
    metadata = {"config": json.dumps(about)}
    save_file({**backbone.state_dict(), **patch.state_dict()}, tmp_path / f"made{WEIGHTS}", metadata)
    x, noise = torch.randn(2, 2, 3, 12, 12, generator=draw)
    t, y = torch.tensor([3, 400]), torch.tensor([6, 7])
    schedule = NoiseSchedule.from_spec(ScheduleSpec("linear", 500))
    with torch.inference_mode():
        plan = patch.plan(backbone.embed(t, None if uncond else y))
        assert plan.routing is not None
        x_t = schedule.add_noise(x, t, noise)
        tensors = {"x": x, "noise": noise, "t": t, "y": y, "gates": plan.routing.gates, "linear.x_t": x_t}
        tensors["dmp_out"] = backbone.denoise(x, t, None if uncond else y, plan.edit)
        prediction = backbone.denoise(x_t, t, None if uncond else y, plan.edit)
    tensors |= {"linear.mse": (prediction - noise).square().mean((1, 2, 3)), "linear.betas": schedule.betas}
    save_file(tensors, tmp_path / f"made{TENSORS}", metadata)
    lines, code = check_directory(tmp_path)
    assert code == 0, "\n".join(lines)
    assert sum(line.startswith("  ok") for line in lines) == 5


def test_the_command_passes_and_prints_errors_beside_tolerances(capsys):
    assert main([str(HERE)]) == 0
    printed = capsys.readouterr().out
    assert "ok   sample.ddpm10" in printed
    assert "tolerance 0.0001" in printed


def test_the_command_fails(copied):
    edit_tensors(copied / (TOPK + TENSORS), lambda tensors: tensors["gates"].mul_(1.001))
    command = [sys.executable, "-m", "tests.golden", str(copied)]
    ended = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "FAIL gates" in ended.stdout


@pytest.mark.parametrize("there", [True, False])
def test_the_command_says_when_there_is_nothing(tmp_path, capsys, there):
    assert main([str(tmp_path if there else tmp_path / "nowhere")]) == 3
    assert not capsys.readouterr().err
