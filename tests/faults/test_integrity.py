"""A number rests on files: what is not what was written is made again or refused; nothing is believed, or goes in silence."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmpctl.comparing import paired_loss
from dmpctl.data.bundled import Digits
from dmpctl.errors import Damaged, IntegrityError
from dmpctl.files import read_json, read_tensors, sha256_of, write_json, write_tensors
from dmpctl.reports.report import curves
from dmpctl.runs.rundir import MetricsLog
from dmpctl.sampling.pictures import write_npz
from tests.faults.fuzz import fuzz
from tests.helpers import copied, flip, patch_run, write_by_hand

FAST = ("--cpu", "--sampler", "ddim", "--steps", "2", "--sample-batch", "64")
MEASURED = (*FAST, "--max-images", "70", "--json")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def page_of_zeros(path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = (len(data) // 2) & ~4095
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def one_bit(path: Path) -> None:
    flip(path, -3)


def same_time(path: Path, damage) -> None:
    """Damage of which the clock knows nothing."""
    status = path.stat()
    damage(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def figures(done) -> dict:
    """The numbers that a command printed."""
    found = json.loads(done.out)
    return {key: found[key] for key in ("metric", "value", "standard_error", "n", "metrics")}


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path / "cache"))
    return copied(finished, tmp_path / "run")


DAMAGES = [cut, page_of_zeros, one_bit]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["features.npy", "seals.npy", "hashes.npy"])
def test_damaged_features_are_extracted_again(cli, run, name, damage):
    """numpy makes a short memory map longer with zeros: a distance of 4.9 was 19.8."""
    whole = cli("fid", run, *MEASURED)
    (path,) = run.glob(f"metrics/features/*/{name}")
    same_time(path, damage)
    again = cli("fid", run, *MEASURED)
    assert again.code == 0, again.err
    assert figures(again) == figures(whole)
    assert "extracted again" in again.err
    assert "extracted again" not in cli("fid", run, *MEASURED).err


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_statistics_of_the_reference_are_computed_again(cli, run, tmp_path, damage):
    whole = cli("fid", run, *MEASURED)
    (path,) = (tmp_path / "cache").glob("statistics/*.safetensors")
    same_time(path, damage)
    again = cli("fid", run, *MEASURED)
    assert (again.code, figures(again)) == (0, figures(whole))
    assert f"put aside as {path.name}.damaged" in again.err
    assert path.with_name(f"{path.name}.damaged").is_file()


def bit_of_a_pixel(path: Path) -> None:
    flip(path, -24)


def other_pixels(path: Path) -> None:
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def other_image(path: Path) -> None:
    shutil.copy(path.with_name("000005.png"), path)


@pytest.mark.parametrize("damage", [cut, bit_of_a_pixel, other_pixels, other_image])
def test_images_that_are_not_what_was_made(cli, run, damage):
    """Of a run they are made again; of a folder they are refused."""
    sampled = ("sample", run, *FAST, "--num-images", "70", "--json")
    folder = Path(json.loads(cli(*sampled).out)["out"])
    whole, bytes_of = cli("fid", run, *MEASURED), (folder / "000003.png").read_bytes()
    damage(folder / "000003.png")
    refused = cli("fid", folder, "--reference", "digits", "--max-images", "70", "--cpu", "--json")
    assert (refused.code, "000003.png" in refused.err) == (4, True)
    shutil.rmtree(run / "metrics" / "features")
    again = cli("fid", run, *MEASURED)
    assert (again.code, figures(again)) == (0, figures(whole))
    assert "000003.png.damaged, and made again" in again.err
    damage(folder / "000003.png")
    made = cli(*sampled)
    assert json.loads(made.out)["made"] == 1
    assert (folder / "000003.png").read_bytes() == bytes_of
    assert (folder / "000003.png.damaged-1").is_file()


def test_a_folder_that_lacks_an_image_is_refused(cli, run):
    folder = Path(json.loads(cli("sample", run, *FAST, "--num-images", "70", "--json").out)["out"])
    (folder / "000033.png").unlink()
    done = cli("fid", folder, "--reference", "digits", "--cpu")
    assert (done.code, "lacks 000033.png" in done.err) == (4, True)


def test_images_of_an_older_dmpctl_are_read_and_that_is_said(cli, run):
    sampled = ("sample", run, *FAST, "--num-images", "3", "--json")
    folder = Path(json.loads(cli(*sampled).out)["out"])
    about = read_json(folder / "samples.json")
    write_by_hand(folder / "samples.json", about | {"schema_version": 1})
    Image.open(folder / "000001.png").save(folder / "000001.png")  # its seal is gone
    again = cli(*sampled)
    assert json.loads(again.out)["made"] == 0
    assert again.err.count("begun by an older dmpctl") == 1


@pytest.mark.parametrize("taken", [None, 70])
def test_a_damaged_npz_is_refused_every_time(cli, run, tmp_path, taken):
    """Its checksum comes after the images: their features must not stay behind."""
    images = Digits().images()[:90]
    write_npz(tmp_path / "x.npz", iter([images]), 90)
    flip(tmp_path / "x.npz", 4000)
    limit = () if taken is None else ("--max-images", taken)
    for _ in range(2):
        done = cli("fid", tmp_path / "x.npz", "--reference", "digits", "--extractor", "pixels", "--allow-small", "--cpu", *limit)
        assert (done.code, "x.npz" in done.err) == (4, True), done.err


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A run with its comparison."""
    run = tmp_path_factory.mktemp("compared") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(paired_loss, "MOST_IMAGES", 40)
        patch_run(run, evaluate=True, eval_images=70, steps=2, sampler="ddim", iters=3)
    return run


def altered(path: Path) -> None:
    """Another digit in a number: still JSON, and still of the right kind."""
    text = path.read_text()
    place = next(k for k, c in enumerate(text) if c in "123456789" and text[k - 1] in " ." and text.count("\n", 0, k) > 2)
    path.write_text(text[:place] + str(int(text[place]) % 9 + 1) + text[place + 1 :])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("config.json", "sample {run} --dry-run"),
        ("config.json", "report {run}"),
        ("patch.json", "sample {run} --dry-run"),
        ("patch.json", "push {run} hf://me/x --dry-run"),
        ("patch.json", "inspect-gates {run} --dry-run"),
        ("patch.json", "export {run} --dry-run"),
        ("provenance.json", "report {run}"),
        ("metrics/comparison-0000003.json", "report {run}"),
        ("metrics/comparison-0000003.json", "push {run} hf://me/x --dry-run"),
    ],
)
@pytest.mark.parametrize("version", [False, True])
def test_a_record_is_refused_where_it_is_changed_or_newer(cli, compared, tmp_path, name, line, version):
    run = copied(compared, tmp_path / "run")
    if version:
        write_json(run / name, read_json(run / name) | {"schema_version": 99})
    else:
        altered(run / name)
    done = cli(*line.format(run=run).split())
    assert done.code == 4, done.err
    assert Path(name).name in done.err
    assert ("schema_version 99" if version else "is damaged: it is not what was written") in done.err


def test_what_is_refused_can_be_taken_on_purpose(cli, compared, tmp_path):
    """As the hint says: without its seal a record is what somebody meant."""
    run = copied(compared, tmp_path / "run")
    altered(run / "provenance.json")
    done = cli("report", run)
    assert 'take its "sealed" away' in done.err
    write_by_hand(run / "provenance.json", json.loads((run / "provenance.json").read_text()))
    assert cli("report", run).code == 0


def test_a_damaged_comparison_is_made_again(compared, tmp_path, cli, most_loss_images):
    most_loss_images(40)
    run = copied(compared, tmp_path / "run")
    path = run / "metrics" / "comparison-0000003.json"
    whole = read_json(path)
    altered(path)
    given = json.loads((run / "config.json").read_text())["settings"]
    assert given["evaluate"]["evaluate"]
    line = "--iters 3 --batch-size 8 --save-every 3 --keep-last 5 --log-every 1 --eval-images 70 --steps 2 --sampler ddim --cpu"
    done = cli("patch", "--run", run, *line.split())
    assert done.code == 0, done.err
    assert "comparison-0000003.json.damaged, and measured again" in done.err
    found = read_json(path)
    assert {**found, "eval_seconds": 0} == {**whole, "eval_seconds": 0}
    assert path.with_name(f"{path.name}.damaged").is_file()


def test_weights_beside_their_record_are_those_that_were_trained(cli, conditional, tmp_path):
    run = copied(conditional, tmp_path / "run")
    flip(run / "backbone.safetensors", -5)
    done = cli("sample", run, "--dry-run", "--cpu")
    assert (done.code, "backbone.safetensors is damaged" in done.err) == (4, True)


def test_tensors_that_describe_themselves_are_sealed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.arange(6.0)}, {"made": "here"})
    assert read_tensors(path)[1] == {"made": "here"}
    for position in (-1, path.read_bytes().index(b"here"), path.read_bytes().index(b'"x"') + 1):
        whole = path.read_bytes()
        flip(path, position)
        with pytest.raises(IntegrityError, match="is damaged"):
            read_tensors(path)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        '{"step": ' + "9" * 4300 + "}",
        '{"step": ' + "9" * 5000 + "}",
        '{"step": NaN}',
        '{"step": Infinity}',
        '{"step": 1e999}',
    ],
    ids=["deep list", "deep object", "4300 digits", "5000 digits", "NaN", "Infinity", "1e999"],
)
@pytest.mark.parametrize("name", ["patch.json", "config.json"])
def test_json_that_nothing_here_can_hold_is_refused(cli, finished, tmp_path, text, name):
    run = copied(finished, tmp_path / "run")
    (run / name).write_text(text)
    done = cli("sample", run, "--dry-run")
    assert (done.code, "is not valid JSON" in done.err) == (4, True), done.err


def logged(run: Path, steps: int) -> MetricsLog:
    log = MetricsLog(run / "metrics.jsonl")
    log._path.unlink(missing_ok=True)
    for step in range(1, steps + 1):
        log.append({"step": step, "loss": step / 8, "lr": [1e-3]})
    return log


def test_damaged_lines_of_a_log_are_named_and_left_out(cli, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    log = logged(run, 40)
    lines = log._path.read_bytes().splitlines(keepends=True)
    lines[6] = lines[6].replace(b"0.875", b"9.875")  # still JSON
    lines[20] = lines[20][:10] + bytes(8) + lines[20][18:]
    log._path.write_bytes(b"".join(lines))
    done = cli("report", run)
    assert done.code == 0, done.err
    assert f"lines 7, 21 of {log._path} are damaged, and left out" in done.out
    assert "9.875" not in (run / "report.html").read_text()
    with pytest.raises(Damaged, match="at line 7"):
        log.lines()


def test_a_resume_keeps_what_it_cuts_if_it_is_damaged(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    log = logged(run, 9)
    whole = log._path.read_bytes()
    assert log.cut_back(9) == []
    assert log._path.read_bytes() == whole
    flip(log._path, len(whole) - 40)
    (line,) = log.cut_back(6)
    assert "1 damaged lines at its end, which are kept in metrics.jsonl.damaged" in line
    assert [found["step"] for found in log.lines()] == [1, 2, 3, 4, 5, 6]
    assert len((run / "metrics.jsonl.damaged").read_bytes()) == len(whole)
    assert log.last_step() == 6


@pytest.mark.parametrize("old", [b'{"step": 1, "loss": 0.5}\n', b""])
def test_logs_of_an_older_dmpctl_are_read_and_gone_on_with(tmp_path, old):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log._path.write_bytes(old + b'{"step": 2, "loss": 0.25}\n')
    log.append({"step": 3, "loss": 0.125})
    assert [line["loss"] for line in log.lines()][-2:] == [0.25, 0.125]
    assert log.cut_back(2) == []
    assert log.last_step() == 2


def test_a_long_log_is_read_from_its_end_and_drawn_from_few_points(tmp_path):
    """The envelope stays: the first, the last, the lowest and the highest of all points are among those that are drawn."""
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 40_001):
            file.write(f'{{"step": {step}, "loss": {abs(step - 23_456) / 1000}}}\n')
    log = MetricsLog(path)
    tracemalloc.start()
    assert log.last_step() == 40_000
    assert log.cut_back(39_990) == []
    assert log.last_step() == 39_990
    (picture,) = curves(log.read(pytest.fail))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "from step 1 to 39990: 23.45 at first, 16.53 at last, between 0 and 23.45" in picture.alt
    assert len(picture.data) < 1_000_000
    assert peak < 40 * 2**20


def test_a_report_leaves_out_what_is_damaged_and_says_so(cli, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    line = ("sample", run, *FAST, "--num-images", "3", "--json")
    sheet = Path(json.loads(cli(*line).out)["out"]) / "contact-sheet.png"
    assert "left out" not in cli("report", run).out
    assert "Contact sheet of samples" in (run / "report.html").read_text()
    for damage in (bit_of_a_pixel, cut):
        damage(sheet)
        done = cli("report", run)
        assert (done.code, f"{sheet} " in done.out, "left out" in done.out) == (0, True, True)
        assert "Contact sheet of samples" not in (run / "report.html").read_text()
    path = run / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    assert "it ends at step 4 of 6" in cli("report", run).out


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_few_damaged_files_of_every_kind_give_no_other_number(tmp_path, monkeypatch):
    """`python -m tests.faults.fuzz` in small, with another seed than the large one's."""
    monkeypatch.setattr(paired_loss, "MOST_IMAGES", 20)
    monkeypatch.setenv("DMPCTL_CACHE_DIR", "")  # so that it is taken back
    counts, faults = fuzz(tries=40, seed=17, folder=tmp_path)
    assert faults == []
    assert sum(counts.values()) == 40
    assert sum(number for (_, _, what), number in counts.items() if what == "equal") < 20  # else nothing was hit


def test_a_run_of_an_older_dmpctl_is_read_and_gone_on_with(cli, finished, tmp_path):
    """Its records have no seals; a manifest's hashes are of the files as they are."""
    run = copied(finished, tmp_path / "run")
    for path in (*run.glob("*.json"), *run.glob("checkpoints/*/patch.json")):
        write_by_hand(path, json.loads(path.read_text()))
    for path in run.glob("checkpoints/*/trainer.json"):
        about = json.loads(path.read_text())
        write_by_hand(path, about | {"sha256": {name: sha256_of(path.parent / name) for name in about["sha256"]}})
    assert cli("sample", run, *FAST, "--num-images", "3").code == 0
    assert cli("report", run).code == 0
    more = (
        "--iters",
        "8",
        "--batch-size",
        "8",
        "--prompt-lr",
        "0.05",
        "--gate-lr",
        "0.05",
        "--ema",
        "0",
        "--cpu",
        "--no-evaluate",
    )
    done = cli("patch", "--run", run, *more)
    assert done.code == 0, done.err
    assert "damaged" not in done.err
