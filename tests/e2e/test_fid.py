"""`dmpctl fid` as reviewers and pipelines use it: references, differences, thresholds, history, interruptions."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dmpctl.data.bundled import Digits
from dmpctl.errors import IntegrityError, MissingError, UsageError
from dmpctl.measuring import evaluate
from dmpctl.metrics.features.pixels import Pixels
from dmpctl.metrics.frechet import moments_to_fid
from dmpctl.metrics.moments import features_to_moments
from dmpctl.metrics.statistics import write_statistics
from dmpctl.types import Silent
from tests.helpers import copied, digit_folder, environment, settings_for

FAST = {"sampler": "ddim", "steps": 3, "sample_batch": 64, "cpu": True, "max_images": 200}


def fid(what, **given):
    return evaluate.fid(settings_for("fid", **{**FAST, **given}), str(what), Silent())


@pytest.fixture
def run(finished, tmp_path):
    return copied(finished, tmp_path / "run")


def counting(monkeypatch):
    """How many images are extracted from now on."""
    seen, call = [], Pixels.outputs
    monkeypatch.setattr(Pixels, "outputs", lambda self, images: (seen.append(len(images)), call(self, images))[1])
    return seen


def test_a_reference_is_computed_once(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    seen = counting(monkeypatch)
    first = fid(run).data["value"]
    assert sum(seen) == 200 + 1797
    seen.clear()
    assert fid(run).data["value"] == pytest.approx(first, rel=1e-9)
    assert sum(seen) == 0  # features of the run and statistics of the digits are there
    assert fid(run, steps=2).data["value"] != first
    assert sum(seen) == 200


def test_saved_statistics_are_a_reference_and_know_how_they_were_made(run, tmp_path):
    stats = tmp_path / "digits.safetensors"
    first = fid(run, save_stats=stats).data
    again = fid(run, reference=str(stats)).data
    assert again["value"] == pytest.approx(first["value"], rel=1e-12)
    assert again["n_reference"] == 1797
    assert again["reference"]["source"]["source"] == Digits().fingerprint
    np.savez(tmp_path / "x.npz", np.zeros((80, 8, 8, 3), np.uint8))
    with pytest.raises(IntegrityError, match="64 features, 192 are compared"):
        fid(tmp_path / "x.npz", reference=str(stats), allow_small=True)


def test_statistics_are_saved_of_images_and_under_a_name_that_says_so(run, tmp_path):
    with pytest.raises(UsageError, match=r"found .*stats\.npz"):
        fid(run, save_stats=tmp_path / "stats.npz")
    fid(run, save_stats=tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="are statistics already"):
        fid(run, reference=str(tmp_path / "a.safetensors"), save_stats=tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_statistics_that_were_made_in_another_way_are_refused_with_what_differs(run, tmp_path):
    moments = features_to_moments([Pixels(1, 8)(Digits().images())])
    about = {"protocol": "clean", "extractor": "another", "shape": [1, 8, 8]}
    write_statistics(tmp_path / "other.safetensors", moments, None, about)
    with pytest.raises(UsageError, match=r"protocol: clean there, pixels here; extractor: another there") as refused:
        fid(run, reference=str(tmp_path / "other.safetensors"))
    assert refused.value.exit_code == 2
    write_statistics(tmp_path / "own.safetensors", moments, None, {**about, "protocol": "pixels"})
    with pytest.raises(UsageError, match="protocol: clean and pixels"):
        fid(tmp_path / "other.safetensors", reference=str(tmp_path / "own.safetensors"))


def test_published_files_as_reference(run, tmp_path):
    x = Pixels(1, 8)(Digits().images()).double()
    np.savez(tmp_path / "stats.npz", mu=x.mean(0).numpy(), sigma=torch.cov(x.T).numpy())
    report = fid(run, reference=str(tmp_path / "stats.npz"))
    assert report.data["value"] == pytest.approx(fid(run).data["value"], rel=1e-9)
    assert report.data["n_reference"] is None
    assert any("does not say how it was made" in line for line in report.lines)
    with pytest.raises(UsageError, match="statistics but no images"):
        fid(run, reference=str(tmp_path / "stats.npz"), metrics="fid,pr")


def test_statistics_against_statistics(tmp_path):
    x = Pixels(1, 8)(Digits().images()).double()
    for name, part in (("a", x[:900]), ("b", x[900:])):
        np.savez(tmp_path / f"{name}.npz", mu=part.mean(0).numpy(), sigma=torch.cov(part.T).numpy())
    expected = moments_to_fid(features_to_moments([x[:900]]), features_to_moments([x[900:]]))
    report = fid(tmp_path / "a.npz", reference=str(tmp_path / "b.npz"))
    assert report.data["value"] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UsageError, match="statistics alone"):
        fid(tmp_path / "a.npz", reference=str(tmp_path / "b.npz"), metrics="kid")


def test_every_metric_that_needs_no_network(run):
    found = fid(run, metrics="pr,dc,kid", max_images=150).data["metrics"]
    assert set(found) == {"fd-pixels-150", "pr-pixels-150", "dc-pixels-150", "kid-pixels-150"}
    assert 0 <= found["pr-pixels-150"]["recall"] <= 1
    assert found["kid-pixels-150"]["subset_size"] == 150
    for metric in ("is", "sfid"):
        with pytest.raises(UsageError, match="Inception's"):
            fid(run, metrics=metric, dry_run=True)  # before anything is made
        with pytest.raises(UsageError, match="Inception's"):
            fid(run, metrics=metric)
    real = fid(run, metrics="fid-infinity", max_images=400).data["metrics"]["fid-infinity-pixels-400"]
    assert real["value"] < fid(run, max_images=400).data["value"]


@pytest.mark.slow
def test_inception_by_every_protocol_and_all_its_metrics(tmp_path, cli, random_inception):
    """Random weights: the numbers mean nothing, but each protocol has one of its own, and says so."""
    one, two = digit_folder(tmp_path / "one", 12), digit_folder(tmp_path / "two", 14)
    common = ("fid", one, "--reference", two, "--extractor-weights", random_inception, "--allow-small", "--cpu", "--json")
    found = {}
    for protocol in ("adm", "pytorch-fid", "clean"):
        done = cli(*common, "--protocol", protocol, "--metrics", "sfid,is,pr,dc,kid")
        assert done.code == 0, done.err
        found[protocol] = json.loads(done.out)
        assert set(found[protocol]["metrics"]) == {f"{name}12" for name in ("fid", "sfid", "is", "pr", "dc", "kid")}
        assert found[protocol]["protocol"]["name"] == protocol
        assert any("not pinned" in line for line in found[protocol]["warnings"])
    assert len({round(report["value"], 6) for report in found.values()}) == 3
    assert found["adm"]["protocol"]["inception_score_split_size"] == 5000
    assert found["adm"]["metrics"]["is12"]["splits"] == 1
    assert found["clean"]["metrics"]["is12"]["splits"] == 10


def test_the_noise_floor_is_one_half_of_the_real_images_against_the_other(run):
    floor = fid(run, noise_floor=True).data["noise_floor"]
    assert (floor["n"], floor["n_reference"]) == (899, 898)
    assert 0 < floor["value"] < 0.5
    assert fid(run, noise_floor=True).data["noise_floor"] == floor


def test_a_difference_on_common_seeds_is_sharper_than_two_distances(run):
    report = fid(run, versus="backbone")
    gap = report.data["versus"]
    own, other = report.data["debiased"], gap["distance"]["debiased"]
    assert gap["value"] == pytest.approx(own - other, rel=1e-9)
    apart = (report.data["standard_error"] ** 2 + gap["distance"]["standard_error"] ** 2) ** 0.5
    assert 0 < gap["standard_error"] < 0.2 * apart
    assert gap["verdict"].startswith(("improved", "no significant change", "worse"))
    assert any(line.startswith(gap["verdict"]) for line in report.lines)
    assert fid(run, versus=str(run)).data["versus"]["value"] == 0.0


def test_what_cannot_be_paired_is_refused_with_what_differs(run, tmp_path, cli):
    folder = tmp_path / "other"
    assert cli("sample", run, "--steps", 2, "--sampler", "ddim", "--num-images", 200, "--out", folder, "--cpu").code == 0
    with pytest.raises(UsageError, match="steps: 3 and 2") as refused:
        fid(run, versus=str(folder))
    assert refused.value.exit_code == 2
    with pytest.raises(UsageError, match="do not pair up"):
        fid(run, versus=str(folder), max_images=201)
    unknown = digit_folder(tmp_path / "real", 200)
    assert any("nothing says that these two sets" in line for line in fid(run, versus=str(unknown)).lines)
    with pytest.raises(UsageError, match="needs a run with a patch"):
        fid(unknown, reference="digits", versus="backbone")


def test_a_folder_of_samples_is_measured_without_its_contact_sheet(run, tmp_path, cli):
    folder = tmp_path / "out"
    assert cli("sample", run, "--steps", 3, "--sampler", "ddim", "--num-images", 200, "--out", folder, "--cpu").code == 0
    report = fid(folder, reference="digits")
    assert report.data["n"] == 200
    assert report.data["value"] == pytest.approx(fid(run).data["value"], rel=1e-6)
    assert fid(folder, reference="digits", versus=str(run)).data["versus"]["value"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"fail_above": 1e6}, 0),
        ({"fail_above": 1e-3}, 6),
        ({"fail_unless_better_than": "SELF"}, 6),
        ({"fail_above": "JUST", "strict": False}, 0),
        ({"fail_above": "JUST", "strict": True}, 6),
    ],
)
def test_thresholds(run, given, code):
    plain = fid(run).data
    just = plain["value"] + 0.5 * plain["standard_error"]
    given = {
        key: {"SELF": str(run), "JUST": just}.get(value, value) if isinstance(value, str) else value
        for key, value in given.items()
    }
    report = fid(run, **given)
    assert report.exit_code == code
    assert bool(report.data["failed"]) == bool(code)
    assert all(line in report.lines for line in report.data["failed"])


def test_a_pipeline_reads_json_and_the_exit_code(run, cli):
    done = cli("fid", run, "--steps", 3, "--sampler", "ddim", "--max-images", 200, "--cpu", "--fail-above", 0.001, "--json")
    assert done.code == 6
    found = json.loads(done.out)
    assert found["failed"][0].startswith("failed: the distance")
    assert (
        cli("fid", run, "--steps", 3, "--sampler", "ddim", "--max-images", 200, "--cpu", "--fail-above", 1e6, "--json").code == 0
    )


def test_the_history_of_a_run(run):
    with pytest.raises(MissingError, match="nothing was measured"):
        fid(run, show=True)
    one, two = fid(run).data["value"], fid(run, steps=2).data["value"]
    report = fid(run, show=True)
    assert [float(row["value"].split()[0]) for row in report.table] == [round(one, 4), round(two, 4)]
    assert "2 different protocols" in report.lines[0]
    fid(run)
    assert len(fid(run, show=True).table) == 2  # the same measurement is one
    fid(run, metrics="kid")
    fid(run)
    kept = fid(run, show=True).data["measurements"]
    assert [set(record["metrics"]) for record in kept].count({"fd-pixels-200", "kid-pixels-200"}) == 1


def test_copies_and_few_images_are_warned_of(tmp_path):
    images = Digits(channels=3).images()[:250].permute(0, 2, 3, 1).numpy()
    images[100] = images[3]
    np.savez(tmp_path / "x.npz", images)
    lines = fid(tmp_path / "x.npz", reference="digits", max_images=250).lines
    assert "warning: 1 of 250 images are copies of another one" in lines


def test_a_killed_measurement_goes_on(run):
    command = [sys.executable, "-m", "dmpctl", "fid", str(run), "--steps", "20", "--sampler", "ddim", "--max-images", "600"]
    command += ["--sample-batch", "8", "--cpu", "--stream"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def done() -> int:
        found = list(run.glob("metrics/features/*/seals.npy"))
        return int((np.load(found[0]) != 0).sum()) if found and found[0].stat().st_size > 8 * 600 else 0

    while done() < 40 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < done() < 600
    whole = {"steps": 20, "max_images": 600, "sample_batch": 8, "stream": True}
    resumed = fid(run, **whole).data["value"]
    (features,) = run.glob("metrics/features/*/features.npy")
    kept = np.load(features)
    for path in features.parent.iterdir():
        path.unlink()
    assert fid(run, **whole).data["value"] == pytest.approx(resumed, rel=1e-9)
    np.testing.assert_array_equal(np.load(features), kept)
