"""`dmpctl compare` as a whole: the exact files, what is done is kept, and what is refused."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dmpctl.files import read_json
from dmpctl.studies import compare as engine
from tests.helpers import digit_folder, environment, files, pretrain_run, run_cli, tree

STUDY = """
[compare]
run = "study"
seeds = [1, 2]
tuning_seeds = [101]
eval_images = 80
against = ["trained-on", "dmp"]
[stages]
flat = "backbone"
under = "backbone/checkpoints/step-0000003"
[settings]
data = "digits"
iters = 4
batch_size = 8
log_every = 2
sampler = "ddim"
steps = 2
[variants.dmp]
method = "dmp"
tune.prompt_lr = [1e-2, 1e-1]
[variants.full]
method = "full"
stages = ["flat"]
[variants.trained-on]
continue = true
"""
RUN = {".lock", "cell.json", "config.json", "metrics.jsonl", "provenance.json"}
PATCH, BACKBONE = RUN | {"patch.json", "patch.safetensors"}, RUN | {"backbone.json", "backbone.safetensors"}


@pytest.fixture(autouse=True)
def _few_images(most_loss_images):
    most_loss_images(20)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a backbone of 6 steps, its checkpoints, and a study."""
    folder = tmp_path_factory.mktemp("compare")
    pretrain_run(folder / "backbone")
    (folder / "study.toml").write_text(STUDY)
    return folder


def tuning_folders(root: Path, stage: str) -> list[str]:
    return sorted(path.name for path in (root / stage / "dmp").glob("tune-*-seed-101"))


def expected(root: Path) -> set[str]:
    """Every file of the study."""
    found = {"table.md", "table.json", "table.csv", "plot.png"}
    for stage in ("flat", "under"):
        found |= {f"{stage}/{name}" for name in (".lock", "stage.json", "stage.safetensors", "dmp/tuned.json")}
        cells = {f"dmp/{name}": PATCH for name in (*tuning_folders(root, stage), "seed-1", "seed-2")}
        cells |= {f"trained-on/seed-{seed}": BACKBONE for seed in (1, 2)}
        cells |= {f"full/seed-{seed}": PATCH for seed in (1, 2)} if stage == "flat" else {}
        found |= {f"{stage}/{cell}/{name}" for cell, names in cells.items() for name in names}
    return found


def test_a_study_from_nothing_and_again(place, monkeypatch, cli):
    monkeypatch.chdir(place)
    root = place / "study"
    planned = cli("compare", "study.toml", "--cpu", "--dry-run")
    assert planned.code == 0, planned.err
    assert "14 cells, 0 of them are done" in planned.out
    assert "prompt_lr 0.01 or 0.1" in planned.out
    assert not root.exists()

    first = cli("compare", "study.toml", "--cpu")
    assert first.code == 0, first.err
    assert len(tuning_folders(root, "flat")) == len(tuning_folders(root, "under")) == 2
    assert files(root) == expected(root)
    for words in ("flat, paired loss against backbone: ", "Fréchet distance", "flat/dmp was tuned on seed 101", "table.md"):
        assert words in first.out
    assert "measured on images that were trained on" in first.out
    rows = list(csv.DictReader((root / "table.csv").open()))
    assert {(r["stage"], r["variant"]) for r in rows} == {
        (s, v) for s in ("flat", "under") for v in ("dmp", "full", "trained-on") if (s, v) != ("under", "full")
    }
    assert {r["seed"] for r in rows} == {"1", "2"}
    table = read_json(root / "table.json", 1)
    assert {(r["stage"], r["measure"], r["against"], r["variant"]) for r in table["rows"] if r["stage"] == "under"} == {
        ("under", measure, against, variant)
        for measure in ("paired_loss", "frechet")
        for against, variant in (
            ("backbone", "dmp"),
            ("backbone", "trained-on"),
            ("trained-on", "dmp"),
            ("dmp", "trained-on"),
        )
    }
    assert table["stages"]["flat"]["frechet"]["noise_floor"] > 0
    assert len(table["stages"]["flat"]["frechet"]["other_seeds"]) == 3

    before = tree(root)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    again = cli("compare", "study.toml", "--cpu", "--json")
    assert again.code == 0, again.err
    assert tree(root) == before
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"table.md", "table.json", "table.csv", "plot.png"}  # written anew, with the same bytes
    assert json.loads(again.out)["rows"] == table["rows"]
    assert "14 cells, 14 of them are done" in cli("compare", "study.toml", "--cpu", "--dry-run").out


def test_a_cell_is_a_run_like_any_other(place, monkeypatch, cli):
    monkeypatch.chdir(place)
    assert cli("compare", "study.toml", "--cpu").code == 0
    for cell in ("study/under/dmp/seed-1", "study/flat/trained-on/seed-1"):
        done = cli("sample", cell, "--num-images", 2, "--steps", 2, "--out", place / "out" / cell)
        assert done.code == 0, done.err


def test_more_variants_and_seeds_join_and_a_changed_one_is_refused(place, monkeypatch, cli):
    monkeypatch.chdir(place)
    assert cli("compare", "study.toml", "--cpu").code == 0
    more = STUDY.replace("seeds = [1, 2]", "seeds = [1, 2, 3]", 1) + '[variants.prompt]\nmethod = "prompt"\nstages = ["under"]\n'
    (place / "more.toml").write_text(more)
    planned = cli("compare", "more.toml", "--cpu", "--dry-run")
    assert "22 cells, 14 of them are done" in planned.out
    before = tree(place / "study")
    (place / "other.toml").write_text(STUDY.replace("iters = 4", "iters = 5"))
    (place / "sampler.toml").write_text(STUDY.replace("steps = 2", "steps = 3"))
    for name, part in (("other.toml", "iters: 4 there, 5 now"), ("sampler.toml", "steps: 2 there, 3 now")):
        refused = cli("compare", name, "--cpu")
        assert refused.code == 2
        assert part in refused.err
        assert "hint: name another run in [compare]" in refused.err
    assert tree(place / "study") == before


def test_the_paired_loss_alone_on_held_out_images(place, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    digit_folder(tmp_path / "held-out", 30)
    lines = {"eval_images = 80": 'eval_images = 0\neval_data = "held-out"', 'against = ["trained-on", "dmp"]': ""}
    text = STUDY.split("[variants.dmp]")[0].replace("seeds = [1, 2]", "seeds = [1]", 1)
    for old, new in lines.items():
        text = text.replace(old, new)
    text = text.replace('"backbone', f'"{place}/backbone')
    (tmp_path / "study.toml").write_text(text + '[variants.lora]\nmethod = "lora"\nrank = 1\n')
    done = cli("compare", "study.toml", "--cpu", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {row["measure"] for row in found["rows"]} == {"paired_loss"}
    assert {row["verdict"] for row in found["rows"]} == {"under 3 seeds: no test"}
    assert not any("trained on" in note for note in found["notes"])
    assert found["stages"]["flat"]["loss_images"] == 20
    assert found["cells"][0].get("frechet") is None
    assert (tmp_path / "study" / "plot.png").is_file()


def test_interrupted_it_keeps_what_is_done(place, tmp_path, monkeypatch, typed, cli):
    """A signal between two cells: 130, and the same command goes on."""
    monkeypatch.chdir(tmp_path)
    text = STUDY.replace('"backbone', f'"{place}/backbone').replace("eval_images = 80", "eval_images = 0")
    (tmp_path / "study.toml").write_text(text.replace("iters = 4", "iters = 6\nsave_every = 2"))
    real, seen = engine.do_cell, []

    def once(cell, side):
        seen.append(cell.name)
        record = real(cell, side)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return record

    monkeypatch.setattr(engine, "do_cell", once)
    typed("dmpctl", "compare", "study.toml", "--cpu")
    stopped = cli("compare", "study.toml", "--cpu")
    assert stopped.code == 130
    assert "error: stopped by SIGINT, 2 cells are done" in stopped.err
    assert "hint: go on with: dmpctl compare study.toml --cpu" in stopped.err
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("cell.json")}
    assert len(done) == 2
    assert not (tmp_path / "study" / "table.md").exists()
    again = cli("compare", "study.toml", "--cpu")
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list((tmp_path / "study").rglob("cell.json"))) == 14


def test_what_does_not_fit_is_one_sentence_before_anything_is_written(place, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    text = STUDY.replace('"backbone', f'"{place}/backbone')
    for old, new, code, part in (
        ("iters = 4", "itres = 4", 2, "study.toml [settings]: itres is no setting\nhint: did you mean iters?"),
        ("tuning_seeds = [101]", "tuning_seeds = [1]", 2, "seed 1 is in seeds and in tuning_seeds"),
        ('"digits"', '"digts"', 2, "no data is called 'digts'"),
        ("eval_images = 80", 'eval_images = 80\nextractor = "inception"', 3, "Inception"),
        ('method = "full"', 'method = "dmp"\nprompts = 5', 2, "5"),
        ("step-0000003", "step-0000004", 2, "step-0000004"),
    ):
        assert old in text
        (tmp_path / "study.toml").write_text(text.replace(old, new))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        failed = cli("compare", "study.toml", "--cpu")
        assert failed.code == code, failed.err
        assert part in failed.err
        assert (failed.out, "internal" in failed.err) == ("", False)
        assert not (tmp_path / "study").exists()
    assert cli("compare", "nothing.toml").code == 3


@pytest.mark.slow
def test_two_processes_share_the_work(place, tmp_path):
    """The same command twice at the same time: each cell is trained by one of them, and both end with the same table."""
    text = STUDY.replace('"backbone', f'"{place}/backbone').replace("eval_images = 80", "eval_images = 0")
    lines = [line for line in text.splitlines() if not line.startswith("under")]
    (tmp_path / "study.toml").write_text("\n".join(lines))
    command = [sys.executable, "-m", "dmpctl", "compare", "study.toml", "--cpu", "--json"]
    pair = [
        subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], [err for _, err in ended]
    assert ended[0][0] == ended[1][0]
    cells = list((tmp_path / "study").rglob("cell.json"))
    assert len(cells) == 8
    for path in cells:
        starts = [session.get("start_step") for session in read_json(path.parent / "provenance.json")["sessions"]]
        assert len([start for start in starts if start is not None]) == 1
    assert run_cli("compare", "study.toml", "--cpu", "--json", cwd=tmp_path).out == ended[0][0]
