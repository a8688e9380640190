"""Statistics that said too much: each case has a truth that nobody here computed with the code under test."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.table1 import DOCS, lines_of
from dmpctl.batches.loader import StepBatches, held_out, order_of
from dmpctl.files import read_json, write_json
from dmpctl.metrics.crossed import crossed_test
from dmpctl.metrics.frechet import Factor, paired_difference
from dmpctl.metrics.infinity import fid_infinity
from dmpctl.metrics.kid import features_to_kid
from dmpctl.metrics.moments import features_to_moments
from dmpctl.settings.measuring import Fid
from dmpctl.studies.results import CellRecord, Results
from dmpctl.studies.table import rows_of
from tests.helpers import SMALL, digit_folder, patch_run
from tests.unit.studies.test_compare import backbone_of, cell


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# compare


@pytest.mark.parametrize("seeds", [3, 5])
def test_images_that_all_seeds_share_count_in_p(seeds):
    """No true effect; seeds hardly differ, images do. A test over seeds alone finds one in nearly every repetition."""
    ours = alone = 0
    for k in range(200):
        gains = normal(1, 300, seed=2 * k) + 0.1 * normal(seeds, 300, seed=2 * k + 1)
        values = gains.mean(1).tolist()
        ours += crossed_test(values, gains.tolist(), [1.0] * seeds).p < 0.05
        alone += stats.ttest_1samp(values, 0).pvalue < 0.05
    assert 2 <= ours <= 20  # of 200: 10 expected
    assert alone > 120


def with_gains(difference: float, gains: list[float]) -> CellRecord:
    """A cell whose two measures have these gains of single images."""
    found = cell(difference, difference).to_json()
    for key in ("paired_loss", "frechet"):
        found[key] = found[key] | {"gains": gains, "standard_error": 0.1}
    return CellRecord.model_validate(found)


def test_nothing_is_bold_that_other_images_could_undo():
    """Each measure, against the backbone and against another variant, image by image: what both have in common cancels."""
    common = (normal(100, seed=1) * 3).tolist()
    mean = sum(common) / 100
    noise = {seed: 0.01 * seed for seed in (1, 2, 3, 4)}
    records = {}
    for seed, off in noise.items():
        records["flat", "one", seed] = with_gains(mean + off, [g + off for g in common])
        records["flat", "other", seed] = with_gains(mean + off - 0.5, [g + off - 0.5 for g in common])
    rows = {(r.measure, r.variant, r.against): r for r in rows_of(Results({"flat": sampled()}, records, ("one",)))}
    for measure in ("paired_loss", "frechet"):
        assert rows[measure, "one", "backbone"].image_error == pytest.approx(float(np.std(common, ddof=1)) / 10)
        assert rows[measure, "one", "backbone"].p_corrected > 0.01
        assert rows[measure, "other", "one"].p_corrected < 1e-6
        assert rows[measure, "other", "one"].verdict == "improved"


def sampled():
    figures = {"value": 9.0, "standard_error": 0.5, "n": 80, "n_reference": 1797, "debiased": None, "other_seeds": [8.5]}
    return backbone_of({**figures, "seed_sd": 0.3, "noise_floor": 0.02})


STUDY = """
[compare]
run = "study"
seeds = [1, 2, 3]
eval_images = 140
extractor = "pixels"
[stages]
flat = "digits"
[settings]
data = "digits"
iters = 2
batch_size = 8
sampler = "ddim"
steps = 2
[variants.p]
method = "prompt"
prompt_lr = 1.0
"""


def test_compare_keeps_the_gains_of_images_and_tests_with_them(tmp_path, monkeypatch, cli, most_loss_images):
    most_loss_images(60)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    done = cli("compare", "study.toml", "--cpu", "--json")
    assert done.code == 0, done.err
    table = json.loads(done.out)
    for measure, images in (("paired_loss", 60), ("frechet", 140)):
        kept = [json.loads((tmp_path / f"study/flat/p/seed-{k}/cell.json").read_text())[measure] for k in (1, 2, 3)]
        assert {len(each["gains"]) for each in kept} == {images}
        row = next(r for r in table["rows"] if r["measure"] == measure)
        gains = np.array([each["gains"] for each in kept])
        assert row["mean"] == pytest.approx(gains.mean())
        assert row["image_error"] == pytest.approx(gains.mean(0).std(ddof=1) / math.sqrt(images), rel=1e-6)
        assert row["standard_error"] >= stats.sem(gains.mean(1)) * (1 - 1e-9)
    assert not any("gains" in cell[measure] for cell in table["cells"] for measure in ("paired_loss", "frechet"))
    # an older record has no gains: the most that its images can add is added, and said
    for k in (1, 2, 3):
        path = tmp_path / f"study/flat/p/seed-{k}/cell.json"
        old = read_json(path)
        old["paired_loss"].pop("gains")
        write_json(path, old)
    again = json.loads(cli("compare", "study.toml", "--cpu", "--json").out)
    bound, exact = (next(r for r in t["rows"] if r["measure"] == "paired_loss") for t in (again, table))
    assert bound["standard_error"] >= exact["standard_error"] * (1 - 1e-9)
    assert any("no gains of single images" in note for note in again["notes"])
    few = STUDY.replace("140", "64").replace('"study"', '"few"')
    (tmp_path / "few.toml").write_text(few)
    refused = cli("compare", "few.toml", "--cpu")
    assert (refused.code, "64 images are too few for 64 features" in refused.err) == (2, True)


def test_the_tables_in_docs_can_be_made_again():
    """From the CSV files alone, images counted: a p over seeds alone of 0.002 is none."""
    lines = lines_of(DOCS / "digits16-optimum-fresh.csv", ["full"])
    full = next(line for line in lines if line.startswith("| optimum, paired loss | full |"))
    assert full == "| optimum, paired loss | full | -0.27 ± 0.20 | 0.24 | **0.0022** | 0.2619 |"
    assert all("no test" in line for line in lines_of(DOCS / "fashion32-table1.csv") if ", frechet" in line)


# distances


def unlike_spectra(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    z = normal(count, 64, seed=seed)
    return z * SCALES[0], z * SCALES[1]


SPECTRUM = torch.logspace(0.3, -3, 64, dtype=torch.float64)
SCALES = (SPECTRUM + 0.012).sqrt(), SPECTRUM.sqrt()
TRUTH = float((SCALES[0] - SCALES[1]).square().sum())  # of diagonal covariances: sum of (sd - sd)^2
REAL = Factor.of_covariance(torch.zeros(64, dtype=torch.float64), torch.diag(SPECTRUM))


def test_a_paired_difference_is_that_of_distances_without_their_bias():
    """Bias is of each side's own covariance: it does not cancel where spectra differ."""
    plain, hits = [], 0
    for seed in range(100):
        gap = paired_difference(*unlike_spectra(150, seed), REAL)
        plain.append(gap.a.value - gap.b.value)
        hits += abs(gap.value - TRUTH) < 1.96 * gap.standard_error
    assert abs(np.mean(plain) - TRUTH) > 2 * np.std(plain)
    assert hits >= 88


@pytest.mark.parametrize("count", [65, 128])
def test_near_the_number_of_features_no_interval_is_claimed(count):
    gap = paired_difference(*unlike_spectra(count, 1), REAL)
    assert (gap.standard_error, gap.p_value, gap.a.debiased, gap.a.standard_error) == (None,) * 4


def test_fid_infinity_covers():
    """12 features, true distance in closed form. The error of the line's fit covered half of the time."""
    reference, hits, truth = features_to_moments([normal(200_000, 12, seed=0)]), 0, 0.3**2 * 12
    for seed in range(1, 101):
        found = fid_infinity(normal(240, 12, seed=seed) + 0.3, reference, seed=seed)
        hits += abs(found.value - truth) < 1.96 * found.standard_error
    assert hits >= 88


def test_kid_covers_with_fewer_images_than_a_subset():
    """Both sides of one law: the truth is 0. The deviation over subsets is 0 here, as each is all there is."""
    hits = 0
    for seed in range(100):
        found = features_to_kid(normal(200, 8, seed=2 * seed), normal(200, 8, seed=2 * seed + 1), subsets=2)
        assert found.deviation < 1e-12
        hits += abs(found.value) < 1.96 * found.standard_error
    assert hits >= 88


def test_kid_says_what_its_sd_is(cli, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    given = ("--max-images", 150, "--sampler", "ddim", "--steps", 2, "--cpu", "--metrics", "kid")
    done = cli("fid", run, *given)
    assert re.search(r"-?\d\.\d{6} ± \S+ \(sd \S+ over 100 subsets of 150\)", done.out), done.out


# words


def test_a_change_on_noise_is_not_called_an_improvement(tmp_path, cli):
    """A few steps at a tiny rate: significant, as images pair up, and no more than rounding. How much it is, is said."""
    run = tmp_path / "run"
    patch_run(run, **SMALL | {"prompt_lr": 1e-5, "gate_lr": 1e-5, "evaluate": True, "eval_images": 130, "steps": 2})
    verdict = json.loads(next(run.glob("metrics/comparison-*.json")).read_text())["paired_loss_verdict"]
    assert re.match(r"(too small a change to name|no significant change): [+-]\S+ % ", verdict), verdict
    assert "improved" not in verdict


def test_the_help_says_how_many_images_a_run_is_measured_on():
    assert "as its --eval-images" in str(Fid.model_fields["max_images"].description)


# held-out images


@pytest.mark.parametrize(("count", "held"), [(1_999, 0), (2_000, 100)])
def test_patch_measures_its_loss_on_images_that_it_was_not_trained_on(tmp_path, count, held, cli, most_loss_images):
    most_loss_images(40)
    run, data = tmp_path / "run", digit_folder(tmp_path / "images", 8)
    first = sorted(data.glob("*.png"))
    for k in range(8, count):
        (data / f"{k:06d}.png").symlink_to(first[k % 8].name)
    done = cli("patch", "--data", data, "--run", run, "--iters", 2, "--batch-size", 8, "--eval-images", 130, "--sampler", "ddim",
               "--steps", 2, "--cpu", "--preset", "digits")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(next(run.glob("metrics/comparison-*.json")).read_text())
    assert found["protocol"]["held_out"] == held
    assert found["paired_loss"]["held_out"] is bool(held)
    assert f"{'held-out' if held else 'training'} images" in found["paired_loss_verdict"]
    science = json.loads((run / "config.json").read_text())["science"]
    assert science["held_out"] == (0.05 if held else 0.0)


def test_what_is_held_out_is_never_drawn():
    class Images:
        def __len__(self) -> int:
            return 2_000

    held = held_out(2_000, 0.05)
    order = StepBatches(1_900, 95, seed=0, draw=order_of(Images(), held))
    epochs = [torch.cat([order.at(step)[1] for step in range(first, first + 20)]) for first in (0, 20)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(set(range(2_000)) - set(held))
    assert not torch.equal(*epochs)


def test_a_run_that_is_older_goes_on_with_all_images(tmp_path):
    """Its record has no such key: it stays the experiment that it was."""
    run = tmp_path / "run"
    patch_run(run, **SMALL | {"iters": 4, "evaluate": False})
    config = read_json(run / "config.json")
    assert config["science"].pop("held_out") == 0.0
    write_json(run / "config.json", config)
    for path in run.glob("patch.*"):
        path.unlink()
    patch_run(run, **SMALL | {"iters": 6, "evaluate": False})
    assert json.loads((run / "config.json").read_text())["science"]["held_out"] is None
