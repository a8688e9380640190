import json
import math

import pytest
import torch
from PIL import Image
from scipy import stats

from dmpctl.engine import gates
from dmpctl.engine.patched import load_patch
from dmpctl.errors import UsageError
from dmpctl.types import Silent
from tests.helpers import BUNDLED, copied, files, patch_run, settings_for


def figures(weights: torch.Tensor, site: int = 0) -> gates.SiteGates:
    return gates.site_gates(site, weights, torch.ones(weights.shape[1], 4))


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
    assert gates.judge([uniform, uniform]) == [
        "uniform: the gate has not learned, every prompt has the same weight at every timestep"
    ]
    assert gates.judge([uniform, figures(fixed)]) == ["the gate prefers some prompts, but the same ones at every timestep"]
    assert gates.judge([uniform, follows])[0].startswith("the gate follows the timestep: weights move by ")
    lines = gates.judge([uniform, figures(one_hot, 1)])
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
    assert files(run) - files(finished) == {"gates/0000006.json", "gates/0000006.png"}
    found = json.loads((run / "gates" / "0000006.json").read_text())
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


def test_a_backbone_has_no_gates(conditional):
    with pytest.raises(UsageError, match="has no gates"):
        gates.inspect(settings_for("inspect-gates"), conditional, Silent())


@pytest.mark.parametrize("sites", [1, 4, 5])
def test_a_heat_map_of_any_number_of_sites(sites):
    draw = torch.Generator().manual_seed(0)
    seen = [
        gates.Seen(site, torch.rand(6, 3 + site % 2, generator=draw).softmax(-1), torch.ones(3 + site % 2, 4))
        for site in range(sites)
    ]
    data = gates.heat_map(seen, [0, 200, 400, 600, 800, 999])
    assert data.startswith(b"\x89PNG")
    assert gates.heat_map(seen, [0, 200, 400, 600, 800, 999]) == data
