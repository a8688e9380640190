import csv
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from dmpctl.errors import MissingError, UsageError
from dmpctl.gates import figures as gate_figures
from dmpctl.gates import inspect as gates
from dmpctl.gates import plots as gate_plots
from dmpctl.models.patch_files import load_patch
from dmpctl.types import Silent
from tests.helpers import BUNDLED, copied, files, patch_run, settings_for


def figures(weights: torch.Tensor, site: int = 0) -> gate_figures.GateFigures:
    return gate_figures.GateFigures.of(gate_figures.SeenGate(site, weights, torch.ones(weights.shape[1], 4)))


def moving(n: int = 4, steps: int = 8) -> torch.Tensor:
    return torch.stack([torch.linspace(-1, 1, n) * t for t in range(steps)]).softmax(-1)


def test_a_uniform_gate():
    found = figures(torch.full((5, 16), 1 / 16))
    assert found.effective == pytest.approx(16)
    assert found.entropy == pytest.approx(math.log(16))
    assert found.top1 == pytest.approx(1 / 16)
    assert (found.dead, found.prompt_norm) == (0, 2.0)
    assert found.cosine_to_uniform == pytest.approx(1)
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert found.over_time == pytest.approx(0, abs=1e-6)


def test_a_one_hot_gate():
    weights = torch.zeros(5, 16)
    weights[:, 3] = 1
    found = figures(weights)
    assert (found.effective, found.entropy, found.top1, found.dead) == (1, 0, 1, 15)
    assert found.cosine_to_uniform == pytest.approx(1 / 4)
    assert found.distance == pytest.approx(2 * 15 / 16)


@pytest.mark.parametrize("dead", range(4))
def test_the_dead_are_counted_exactly(dead):
    """A prompt is dead below a tenth of 1/N on average, however much it speaks at one timestep."""
    weights = torch.full((10, 8), 1.0)
    weights[:, 4:] = 0.12
    weights[:, :dead] = 0.05
    weights[0, :dead] = 0.5  # on average 0.095: still dead
    assert figures(weights / 8).dead == dead


def test_entropy_against_scipy():
    weights = moving()
    found = figures(weights)
    assert found.entropy == pytest.approx(stats.entropy(weights.numpy(), axis=1).mean(), rel=1e-5)
    assert found.effective == pytest.approx(math.e ** stats.entropy(weights.numpy(), axis=1).mean(), rel=0.2)
    assert 1 < found.effective < 4


def test_sentences():
    uniform = figures(torch.full((5, 16), 1 / 16))
    fixed = torch.rand(16, generator=torch.Generator().manual_seed(0)).softmax(0).expand(5, 16)
    one_hot = torch.zeros(5, 16)
    one_hot[:, 3] = 1
    follows = figures(moving())
    assert gate_figures.judge([uniform, uniform]) == [
        "uniform: the gate has not learned, every prompt has the same weight at every timestep"
    ]
    assert gate_figures.judge([uniform, figures(fixed)]) == ["the gate prefers some prompts, but the same ones at every timestep"]
    assert gate_figures.judge([uniform, follows])[0].startswith("the gate follows the timestep: weights move by ")
    lines = gate_figures.judge([uniform, figures(one_hot, 1)])
    assert "warning: collapsed at site 1: fewer than 2 prompts are in use" in lines
    assert "warning: 15 dead prompts in all (mean weight under 0.1 / 16)" in lines


def test_a_fresh_patch_is_uniform(tmp_path):
    patch_run(tmp_path / "run", iters=1, prompt_lr=1e-12, gate_lr=1e-12)
    report = gates.inspect(settings_for("inspect-gates", plot=False), tmp_path / "run", Silent())
    assert report.lines[0].startswith("uniform: the gate has not learned")
    assert [site["effective"] for site in report.data["sites"]] == pytest.approx([16] * BUNDLED.depth)


def test_what_is_written(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    report = gates.inspect(settings_for("inspect-gates", timesteps=7), run, Silent())
    assert files(run) - files(finished) == {
        "gates/0000006.json",
        "gates/0000006.png",
        "gates/0000006-timesteps.png",
        "gates/0000006.html",
    }
    found = json.loads((run / "gates" / "0000006.json").read_text())
    assert found.pop("sealed") is not None
    assert found == json.loads(json.dumps(report.data))
    assert (found["schema_version"], found["step"], {site["prompts"] for site in found["sites"]}) == (1, 6, {16})
    assert found["timesteps"] == [0, 166, 333, 500, 666, 832, 999]
    weights = torch.tensor(found["gates"])
    assert weights.shape == (BUNDLED.depth, 7, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(BUNDLED.depth, 7))
    with Image.open(run / "gates" / "0000006.png") as picture:
        picture.load()
    assert len(report.table) == BUNDLED.depth


def test_the_gates_are_those_of_the_model(finished, tmp_path):
    """What is shown is what mixes the prompts when the model runs."""
    model = load_patch(finished)
    run = copied(finished, tmp_path / "run")
    report = gates.inspect(settings_for("inspect-gates", timesteps=5, plot=False), run, Silent())
    t = torch.tensor(report.data["timesteps"])
    with torch.no_grad():
        routing = model.patch.plan(model.backbone.model.embed(t, None)).routing
    torch.testing.assert_close(torch.tensor(report.data["gates"]), routing.gates)


def test_no_plot_another_place_and_nothing(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    report = gates.inspect(settings_for("inspect-gates", dry_run=True), run, Silent())
    assert report.lines[-1] == "dry run: nothing was written"
    assert files(run) == files(finished)
    gates.inspect(settings_for("inspect-gates", plot=False, out=tmp_path / "here"), run, Silent())
    assert files(run) == files(finished)
    assert files(tmp_path / "here") == {"0000006.json"}
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write to"):
        gates.inspect(settings_for("inspect-gates", out=tmp_path / "file"), run, Silent())


def test_classes_are_averaged(conditional, tmp_path):
    patch_run(tmp_path / "run", base=str(conditional), gate_lr=0.1)
    report = gates.inspect(settings_for("inspect-gates", timesteps=4, plot=False), tmp_path / "run", Silent())
    model, t = load_patch(tmp_path / "run"), torch.tensor(report.data["timesteps"])
    with torch.no_grad():
        each = [model.patch.route(model.backbone.model.embed(t, torch.full((4,), label))).gates for label in range(10)]
    torch.testing.assert_close(torch.tensor(report.data["gates"]), torch.stack(each).mean(0))
    one = gates.inspect(settings_for("inspect-gates", timesteps=4, plot=False, image_label=7), tmp_path / "run", Silent())
    torch.testing.assert_close(torch.tensor(one.data["gates"]), each[7])
    with pytest.raises(UsageError, match="--label 10 is out of range"):
        gates.inspect(settings_for("inspect-gates", image_label=10), tmp_path / "run", Silent())


def test_a_backbone_has_no_gates(conditional):
    with pytest.raises(UsageError, match="has no gates"):
        gates.inspect(settings_for("inspect-gates"), conditional, Silent())


@pytest.mark.parametrize("sites", [1, 4, 5])
def test_a_heat_map_of_any_number_of_sites(sites):
    draw = torch.Generator().manual_seed(0)
    blocks = [
        gate_figures.SeenGate(site, torch.rand(6, 3 + site % 2, generator=draw).softmax(-1), torch.ones(3 + site % 2, 4))
        for site in range(sites)
    ]
    seen = gate_figures.GatesSeen([0, 200, 400, 600, 800, 999], blocks)
    data = gate_plots.heat_map(seen)
    assert data.startswith(b"\x89PNG")
    assert gate_plots.heat_map(seen) == data


def test_similarity_of_prompts_and_of_timesteps():
    assert gate_figures.mean_cosine(torch.eye(4)) == 0
    assert gate_figures.mean_cosine(torch.ones(3, 5)) == pytest.approx(1)
    assert gate_figures.mean_cosine(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(-1)
    assert gate_figures.mean_cosine(torch.ones(1, 5)) == 0
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [1 / 3] * 3])
    found = gate_figures.timestep_similarity(weights)
    expected = torch.tensor(np.corrcoef(weights[:3].numpy())).float()
    torch.testing.assert_close(found[:3, :3], expected, rtol=0, atol=1e-5)
    assert found[3].abs().max() < 1e-3


def test_every_weight_as_a_line(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    report = gates.inspect(settings_for("inspect-gates", timesteps=3, csv=True), run, Silent())
    lines = list(csv.DictReader((run / "gates" / "0000006.csv").open()))
    assert len(lines) == BUNDLED.depth * 3 * 16
    last = lines[-1]
    assert (last["site"], last["timestep"], last["prompt"]) == (str(BUNDLED.depth - 1), "999", "15")
    assert float(last["weight"]) == pytest.approx(report.data["gates"][-1][-1][-1], rel=1e-6)
    text = (run / "gates" / "0000006.html").read_text("utf-8")
    assert text.count("data:image/png;base64,") == 2
    assert "http" not in re.sub(r"data:[^\"]*", "", text)


def test_the_size_of_an_edit_is_what_it_adds(finished, tmp_path):
    """Against prompts that are all one vector, whose edit is known whatever the gate says."""
    run = copied(finished, tmp_path / "run")
    report = gates.inspect(settings_for("inspect-gates", with_backbone=True, plot=False), run, Silent())
    found = report.data["edit"]
    assert len(found["timesteps"]) == 5
    assert set(found["sites"]) == {str(site) for site in range(BUNDLED.depth)}
    model = load_patch(finished)
    with torch.no_grad():
        for tensor in model.patch.prompt_parameters():
            tensor.mul_(2)
    twice = gates.edit_sizes(model, settings_for("inspect-gates"), Silent())
    first = (found["sites"]["0"]["mean"], twice.sites["0"].mean)
    assert first[1] == pytest.approx(2 * first[0], rel=1e-4)  # no block has run before the first
    assert 0 < first[0] < 1


def test_beside_another_run(finished, tmp_path):
    same = gates.inspect(
        settings_for("inspect-gates", compare_with=finished, plot=False), copied(finished, tmp_path / "a"), Silent()
    )
    assert all(site["distance"] == 0 for site in same.data["compared"]["sites"])
    patch_run(tmp_path / "b", prompt_lr=1e-12, gate_lr=1e-12)  # uniform
    other = gates.inspect(settings_for("inspect-gates", compare_with=tmp_path / "b", plot=False), tmp_path / "a", Silent())
    for site, mine in zip(other.data["compared"]["sites"], other.data["sites"], strict=True):
        assert site["distance"] == pytest.approx(mine["distance"], rel=1e-4)
    patch_run(tmp_path / "c", prompt_depth=1)
    with pytest.raises(UsageError, match="are of other sites or sizes"):
        gates.inspect(settings_for("inspect-gates", compare_with=tmp_path / "c"), tmp_path / "a", Silent())


def test_a_run_in_progress_is_watched_until_it_ends(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    for name in ("patch.json", "patch.safetensors"):
        (run / name).rename(tmp_path / name)
    shutil.move(run / "checkpoints" / "step-0000006", tmp_path / "later")
    said: list[str] = []

    class Talk(Silent):
        def say(self, message: str) -> None:
            said.append(message)
            if len(said) == 1:  # the next checkpoint, then the end
                shutil.move(tmp_path / "later", run / "checkpoints" / "step-0000006")
            else:
                (tmp_path / "patch.json").rename(run / "patch.json")

    report = gates.inspect(settings_for("inspect-gates", watch=1, plot=False), run, Talk())
    assert [line.split(":")[0] for line in said] == ["step 3", "step 6"]
    assert report.data["step"] == 6
    assert {path.name for path in (run / "gates").iterdir()} == {"0000003.json", "0000006.json"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "patch.json").write_text("{}")
    with pytest.raises(MissingError, match="has no checkpoint yet"):
        gates.inspect(settings_for("inspect-gates", watch=1), tmp_path / "empty", Silent())
