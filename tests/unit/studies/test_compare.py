"""Statistics of a study, its tuning, and the backbone that is trained on."""

import csv
import io
import math
import shutil
import warnings

import pytest
import torch
from scipy import stats

from dmpctl.errors import NumericalError, UsageError
from dmpctl.files import locked, read_json
from dmpctl.metrics.crossed import CrossedTest, crossed_test
from dmpctl.studies import cell as study_cell
from dmpctl.studies import compare as engine
from dmpctl.studies.cell import seconds_of
from dmpctl.studies.compare import Candidate, best, compare
from dmpctl.studies.plot import plot
from dmpctl.studies.results import CellRecord, Results, StageRecord, refuse_other
from dmpctl.studies.table import bands_of, holm, markdown, rows_of, sentences, tidy, word
from dmpctl.types import Silent
from tests.helpers import pretrain_run, settings_for, tensors_of

GAINS = {"a": (-3.1, -2.9, -3.3, -3.0, -2.7), "b": (0.5, -0.4, 0.1, 0.2, -0.3), "c": (4.0, 5.0, 4.5, 3.0, 5.5)}


def cell(loss: float | None, distance: float | None = None) -> CellRecord:
    """A finished cell with these differences, the same for every image; a loss of None: it failed."""
    found = {"schema_version": 1, "identity": "", "shaped_by": {}, "seed": 1, "choice": {}, "iterations": 4, "train_seconds": 2.0}
    found |= {"added_parameters": 10, "added_percent": 1.5, "failed": "not finite" if loss is None else None}
    if loss is not None:
        bands = [{"from": 200 * k, "to": 200 * k + 199, "difference": loss * k, "standard_error": 0.1} for k in range(5)]
        figures = {"backbone": 1.0, "model": 1.0 + loss, "difference": loss, "standard_error": 0.3}
        found["paired_loss"] = {**figures, "gains": [loss] * 3, "bands": bands}
        if distance is not None:
            found["frechet"] = {**figures, "difference": distance, "standard_error": None}
    return CellRecord.model_validate(found)


def backbone_of(frechet: dict | None = None) -> StageRecord:
    about = {"schema_version": 1, "identity": "", "shaped_by": {}, "backbone": "digits", "sha256": ""}
    return StageRecord.model_validate({**about, "paired_loss": 1.0, "parameters": 700, "frechet": frechet})


BACKBONE = backbone_of()
SAMPLED = {"value": 9.0, "standard_error": 0.5, "n": 80, "n_reference": 1797, "debiased": None, "other_seeds": [8.5, 9.1, 9.2]}
SAMPLED |= {"seed_sd": 0.3, "noise_floor": 0.02}


def results(against=(), **more) -> Results:
    records = {("flat", name, seed): cell(gain) for name, gains in GAINS.items() for seed, gain in enumerate(gains, 1)}
    return Results({"flat": BACKBONE}, records | more.get("records", {}), tuple(against))


def row(rows, variant, against="backbone"):
    return next(r for r in rows if (r.variant, r.against) == (variant, against))


IMAGES = 40


def each_image(gain: float, seed: int, noise: float = 0.2) -> list[float]:
    """Gains of single images with this mean, which seeds have next to nothing of in common."""
    drawn = torch.randn(IMAGES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * noise
    return (gain + drawn - drawn.mean()).tolist()


def alone(values):
    """The same test, where images differ by nothing: over seeds alone."""
    return crossed_test(values, [[value] * IMAGES for value in values], [0.0] * len(values))


def test_where_images_do_not_differ_the_test_is_scipys():
    for values in GAINS.values():
        found, expected = alone(values), stats.ttest_1samp(values, 0)
        assert found.t == pytest.approx(expected.statistic)
        assert found.p == pytest.approx(expected.pvalue)
        assert found.standard_error == pytest.approx(stats.sem(values))


def test_where_seeds_do_not_differ_the_test_is_that_over_images():
    gains = each_image(0.1, 1, 1.0)
    found, expected = crossed_test([0.1] * 4, [gains] * 4, [None] * 3 + [0.1]), stats.ttest_1samp(gains, 0)
    assert found.p is None  # an error is not known
    found = crossed_test([0.1] * 4, [gains] * 4, [0.1] * 4)
    assert (found.standard_error, found.df) == (pytest.approx(stats.sem(gains)), pytest.approx(IMAGES - 1))
    assert found.p == pytest.approx(expected.pvalue)


def test_without_gains_the_errors_over_images_are_added_whole():
    values, errors = GAINS["a"], [0.3, 0.4, 0.3, 0.2, 0.3]
    found, image = crossed_test(values, None, errors), sum(e**2 for e in errors) / 5
    assert found.standard_error == pytest.approx(math.sqrt(stats.sem(values) ** 2 + image))
    assert found.image_error == pytest.approx(math.sqrt(image))
    assert found.df == pytest.approx((stats.sem(values) ** 2 + image) ** 2 / (stats.sem(values) ** 4 / 4), rel=1e-3)


def test_no_spread_and_one_value_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alone([0.0, 0.0, 0.0]) == CrossedTest(0.0, 0.0, 0.0, 0.0, None, None, 1.0)
        assert alone([-0.5, -0.5, -0.5]).p == 0.0
        assert alone([0.25]) == CrossedTest(0.25, image_error=0.0)
        assert alone([0.25, 0.5]).p is None
        assert crossed_test([], [], []) == CrossedTest()


def test_holm_is_the_textbook_example():
    """R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm"), the example of many textbooks."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_rows_test_each_variant_and_correct_over_all():
    rows = rows_of(results())
    assert [r.variant for r in rows] == ["a", "b", "c"]
    p = {name: stats.ttest_1samp(gains, 0).pvalue for name, gains in GAINS.items()}
    assert row(rows, "a").p_corrected == pytest.approx(3 * p["a"])  # the smallest of three
    assert row(rows, "c").p_corrected == pytest.approx(2 * p["c"])
    assert row(rows, "b").p_corrected == pytest.approx(p["b"])
    assert p["a"] < p["c"] < p["b"]
    assert [r.verdict for r in rows] == ["improved", "no significant change", "worse"]
    assert {r.family for r in rows} == {3}
    assert row(rows, "a").percent == pytest.approx(100 * sum(GAINS["a"]) / 5)


def test_against_another_variant_is_paired_by_seed():
    rows = rows_of(results(["b"]))
    found = row(rows, "a", "b")
    expected = stats.ttest_rel(GAINS["a"], GAINS["b"])
    assert (found.t, found.p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
    assert (found.family, found.verdict) == (2, "improved")
    assert len([r for r in rows if r.against == "b"]) == 2
    assert rows_of(results(["elsewhere"])) == rows_of(results())  # a variant that this stage does not have


def test_too_few_seeds_or_images_are_not_tested():
    only = Results({"flat": BACKBONE}, {("flat", "a", 1): cell(-5.0)})
    found = row(rows_of(only), "a")
    assert (found.mean, found.p, found.p_corrected, found.verdict) == (-5.0, None, None, "under 3 seeds: no test")

    few = Results({"flat": backbone_of(SAMPLED)}, {("flat", "a", k): cell(-5.0, -1.0) for k in (1, 2, 3)})
    assert [r.verdict for r in rows_of(few)] == ["improved", "too few images: no test"]


def test_a_failed_training_is_said_and_not_tested():
    rows = rows_of(results(records={("flat", "c", 2): cell(None)}))
    assert row(rows, "c").verdict == "failed on 1 of 5 seeds"
    assert (row(rows, "c").p, row(rows, "a").family) == (None, 2)
    everything = Results({"flat": BACKBONE}, {("flat", "a", seed): cell(None) for seed in (1, 2)})
    assert row(rows_of(everything), "a").verdict == "failed on 2 of 2 seeds"
    for text in (markdown(everything, rows_of(everything), []), tidy(everything)):
        assert "nan" not in text.lower()


def test_the_verdict_needs_a_corrected_p_under_one_percent():
    assert [word(-1.0, 0.0099), word(1.0, 0.0099), word(-1.0, 0.01), word(0.0, 0.0)] == [
        "improved",
        "worse",
        "no significant change",
        "no significant change",
    ]


def test_tables_say_what_was_measured():
    found = results(["b"])
    rows = rows_of(found)
    text = markdown(found, rows, ["a note"])
    assert "- a note" in text
    line = next(part for part in text.splitlines() if part.startswith("| a |"))
    assert line.count("|") == text.split("| variant")[1].split("\n")[0].count("|") + 1
    assert "-300000.00 ± 22360.68" in line  # in units of 1e-5
    assert "| t 0-199 | t 200-399 |" in text
    table = list(csv.DictReader(io.StringIO(tidy(found))))
    assert len(table) == 15 * (1 + 5 + 4)
    first = next(r for r in table if (r["variant"], r["seed"], r["measure"]) == ("c", "2", "paired_loss"))
    assert (float(first["difference"]), float(first["model"])) == (5.0, 6.0)
    assert sentences(rows)[0] == ("flat, paired loss against backbone: improved: a; no significant change: b; worse: c")
    assert bands_of(found)["flat", "a", 400, 599].mean == pytest.approx(2 * sum(GAINS["a"]) / 5)


def test_the_plot_has_a_panel_per_stage_and_measure():
    sampled = backbone_of(SAMPLED)
    records = {(s, v, k): cell(k - 2.0, k / 10) for s in ("flat", "under") for v in ("a", "b") for k in (1, 2, 3)}
    found = Results({"flat": sampled, "under": sampled}, records)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = plot(found, rows_of(found))
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert width > height > 200
    assert plot(found, rows_of(found)) == picture


def test_seconds_are_those_of_every_session():
    lines = [{"step": 12, "steps_per_sec": 2.0}, {"step": 20, "steps_per_sec": 4.0}, {"step": 21, "steps_per_sec": 0.0}]
    assert seconds_of(lines, 10) == 1.0 + 2.0
    assert seconds_of([], 0) == 0.0


def test_the_smallest_mean_is_chosen_and_what_failed_is_not():
    grid = [Candidate.of({"lr": lr}, gains) for lr, gains in ((1, [0.0, -2.0]), (2, [-3.0, None]), (3, [-0.5]))]
    assert best(grid, "x") == {"lr": 1}
    with pytest.raises(NumericalError, match="no rate that x was tuned with"):
        best(grid[1:2], "x")


def test_a_setting_that_is_newer_than_the_record_stands_at_its_default(tmp_path):
    refuse_other(tmp_path, {"iters": 3}, {"iters": 3, "ema": 0.0})
    with pytest.raises(UsageError, match=r"ema: 0\.0 there, 0\.5 now"):
        refuse_other(tmp_path, {"iters": 3}, {"iters": 3, "ema": 0.5})
    with pytest.raises(UsageError, match="iters: 3 there, None now"):
        refuse_other(tmp_path, {"iters": 3}, {})


# Studies of a few steps.

SETTINGS = '[settings]\ndata = "digits"\niters = 2\nbatch_size = 8\nlog_every = 1\n'


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A run of `dmpctl pretrain` with checkpoints at 3 and 6 and an average. Not to be written to."""
    run = tmp_path_factory.mktemp("base") / "backbone"
    pretrain_run(run, ema=0.9)
    return run


@pytest.fixture
def study(tmp_path, most_loss_images):
    """Write a study and run it; returns its run directory."""
    most_loss_images(20)

    def run(variants: str, stages: str, protocol: str = "seeds = [0]\neval_images = 0", dry_run: bool = False):
        path = tmp_path / "study.toml"
        path.write_text(f'[compare]\nrun = "{tmp_path / "study"}"\n{protocol}\n[stages]\n{stages}\n{SETTINGS}\n{variants}\n')
        report = compare(settings_for("compare", cpu=True, dry_run=dry_run), path, Silent())
        return report if dry_run else tmp_path / "study"

    return run


ON = "[variants.on]\ncontinue = true\n"


def test_trained_on_is_pretraining_that_was_never_interrupted(study, backbone, tmp_path):
    """From the newest checkpoint and from a named one, on the backbone's own seed: bit for bit the longer pretraining."""
    named = backbone / "checkpoints" / "step-0000003"
    root = study(ON, f'flat = "{backbone}"\nunder = "{named}"')
    for stage, steps in (("flat", 8), ("under", 5)):
        straight = tmp_path / f"straight-{steps}"
        pretrain_run(straight, ema=0.9, iters=steps)
        ours, expected = (tensors_of(run / "backbone.safetensors") for run in (root / stage / "on" / "seed-0", straight))
        assert set(ours) == set(expected)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
        assert not (root / stage / "on" / "seed-0" / "checkpoints").exists()
        found = read_json(root / stage / "on" / "seed-0" / "cell.json")
        assert (found["iterations"], found["added_percent"]) == (2, 100.0)


def test_another_seed_trains_on_in_another_order(study, backbone):
    root = study(ON, f'flat = "{backbone}"', "seeds = [0, 1]\neval_images = 0")
    a, b = (tensors_of(root / "flat" / "on" / f"seed-{seed}" / "backbone.safetensors") for seed in (0, 1))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_what_cannot_go_on_is_refused_in_a_sentence(study, backbone, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(backbone / "backbone.safetensors", bare)
    decayed, newer = tmp_path / "decayed", tmp_path / "newer"
    pretrain_run(decayed, lr_schedule="cosine")
    shutil.copytree(backbone, newer)
    shutil.copytree(backbone / "checkpoints" / "step-0000003", newer / "checkpoints" / "step-0000009")
    refused = {
        "digits": "digits has no trainer state",
        str(bare): "has no trainer state",
        str(decayed): r"has decayed \(lr_schedule cosine\)",
        str(newer): "is not the backbone that",
    }
    for base, message in refused.items():
        with pytest.raises(UsageError, match=f"on cannot go on from flat: .*{message}") as failure:
            study(ON, f'flat = "{base}"')
        assert failure.value.hint == "leave flat out of the stages of on"
    assert not (tmp_path / "study").exists()
    report = study('[variants.on]\ncontinue = true\nstages = ["flat"]', f'flat = "{backbone}"\nbest = "{decayed}"', dry_run=True)
    assert report.data["cells"] == 1


TUNED = '[variants.p]\nmethod = "prompt"\ntune.prompt_lr = [1e-3, 3e-3, 1e-2]\n'
TUNING = "seeds = [1, 2]\ntuning_seeds = [101, 102]\neval_images = 0"


def planted(losses: dict[float, float | None], calls: list):
    """In place of measuring: a loss that depends on the rate alone; None: it was not finite."""

    def measured(model, stage, side, tuning):
        rate = model.record.method.prompt_lr
        calls.append((tuning, rate))
        if losses[rate] is None:
            raise NumericalError("planted")
        return cell(losses[rate]).paired_loss, None

    return measured


def test_tuning_picks_the_best_on_its_own_seeds(study, monkeypatch):
    calls: list = []
    monkeypatch.setattr(study_cell, "measured", planted({1e-3: -1.0, 3e-3: -2.0, 1e-2: None}, calls))
    root = study(TUNED, 'flat = "digits"', TUNING)
    found = read_json(root / "flat" / "p" / "tuned.json")
    assert found["chosen"] == {"prompt_lr": 3e-3}
    assert found["seeds"] == [101, 102]
    assert [(c["choice"]["prompt_lr"], c["mean"]) for c in found["candidates"]] == [(1e-3, -1.0), (3e-3, -2.0), (1e-2, None)]
    assert [call for call in calls if not call[0]] == [(False, 3e-3)] * 2
    assert sorted(call for call in calls if call[0]) == [(True, rate) for rate in (1e-3, 1e-3, 3e-3, 3e-3, 1e-2, 1e-2)]
    seeds = {path.name: read_json(path / "config.json")["science"]["seed"] for path in (root / "flat" / "p").glob("*-*")}
    assert {seed for name, seed in seeds.items() if name.startswith("tune-")} == {101, 102}
    assert {seed for name, seed in seeds.items() if name.startswith("seed-")} == {1, 2}
    table = read_json(root / "table.json")
    assert {c["seed"] for c in table["cells"]} == {1, 2}
    assert table["cells"][0]["choice"] == {"prompt_lr": 3e-3}
    assert "flat/p was tuned on seed 101, 102: prompt_lr 0.003" in table["notes"]


def test_one_stage_may_tune_for_all_and_an_edge_is_said(study, backbone, monkeypatch):
    calls: list = []
    monkeypatch.setattr(study_cell, "measured", planted({1e-3: -1.0, 3e-3: -2.0, 1e-2: -3.0}, calls))
    stages = f'flat = "digits"\nunder = "{backbone}"'
    root = study(TUNED, stages, TUNING + '\ntune_stage = "under"')
    assert not list((root / "flat").glob("p/tune*"))
    assert len(list((root / "under").glob("p/tune-*"))) == 6
    assert [call for call in calls if not call[0]] == [(False, 1e-2)] * 4
    assert any("prompt_lr is at the end of its grid" in note for note in read_json(root / "table.json")["notes"])


def test_tuning_sees_another_noise_than_reporting(study):
    root = study('[variants.p]\nmethod = "prompt"\n', 'flat = "digits"')
    side = tensors_of(root / "flat" / "stage.safetensors")
    assert side["errors"].shape == side["tuning_errors"].shape == (25, 20)
    assert not torch.equal(side["errors"], side["tuning_errors"])
    reported = read_json(root / "flat" / "p" / "seed-0" / "cell.json")["paired_loss"]
    assert reported["backbone"] == pytest.approx(float(side["errors"].mean()), rel=1e-12)
    assert sum(band["difference"] for band in reported["bands"]) / 5 == pytest.approx(reported["difference"], abs=1e-12)


def test_a_cell_that_another_process_has_is_put_off(study, tmp_path, monkeypatch):
    """Its run is locked: the others are done first, then it is looked at again every second."""
    held = study_cell.RunDir(tmp_path / "study" / "flat" / "p" / "seed-0").__enter__()
    order: list[str] = []
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: (order.append("waited"), held.__exit__(None, None, None)))
    real = study_cell._train
    monkeypatch.setattr(study_cell, "_train", lambda cell, run: (order.append(cell.name), real(cell, run))[1])
    study('[variants.p]\nmethod = "prompt"\n', 'flat = "digits"', "seeds = [0, 1]\neval_images = 0")
    assert order == ["flat/p/seed-1", "waited", "flat/p/seed-0"]


def test_a_backbone_that_another_process_measures_is_waited_for(study, tmp_path, monkeypatch):
    (tmp_path / "study" / "flat").mkdir(parents=True)
    held = locked(tmp_path / "study" / "flat" / ".lock")
    assert held.__enter__()
    waited: list[float] = []
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: (waited.append(seconds), held.__exit__(None, None, None)))
    study('[variants.p]\nmethod = "prompt"\n', 'flat = "digits"')
    assert waited == [1.0]


def test_the_loss_is_that_of_patch(study, tmp_path):
    """A cell is what `dmpctl patch` with the same settings makes, and it is measured as that command measures."""
    from dmpctl.training.patch import patch

    root = study('[variants.d]\nmethod = "dmp"\nprompt_lr = 0.1\n', 'flat = "digits"', "seeds = [3]\neval_images = 130")
    given = {"run": tmp_path / "alone", "seed": 3, "iters": 2, "batch_size": 8, "log_every": 1, "prompt_lr": 0.1, "cpu": True}
    alone = patch(settings_for("patch", **given, eval_images=130), Silent()).data
    found = read_json(root / "flat" / "d" / "seed-3" / "cell.json")
    ours, theirs = (tensors_of(run / "patch.safetensors") for run in (root / "flat" / "d" / "seed-3", tmp_path / "alone"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found["paired_loss"]["difference"] == alone["paired_loss"]["difference"] != 0
    assert found["paired_loss"]["standard_error"] == alone["paired_loss"]["standard_error"]
    for key in ("value", "standard_error"):
        name = {"value": "difference"}.get(key, key)
        assert math.isclose(found["frechet"][name], alone["difference"][key], rel_tol=1e-6, abs_tol=1e-9)
    assert found["frechet"]["backbone"] == pytest.approx(alone["backbone"]["value"])
