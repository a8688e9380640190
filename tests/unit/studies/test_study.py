"""The file of `dmpctl compare`: what it may say, and what each variant's settings become."""

import pytest

from dmpctl.errors import MissingError, UsageError
from dmpctl.settings.options import options_of
from dmpctl.studies.study import OURS, read_study, settings_of

FILE = """
[compare]
run = "runs/study"
seeds = [1, 2]
tuning_seeds = [101]
against = ["dmp"]
[stages]
flat = "digits"
under = "runs/backbone"
[settings]
iters = 7
batch-size = 8
[variants.dmp]
method = "dmp"
tune.prompt_lr = [1e-3, 1e-2]
tune.gate_lr = [1e-3, 1e-4]
[variants.full]
method = "full"
iters = 9
stages = ["flat"]
[variants.trained-on]
continue = true
"""


@pytest.fixture
def study(tmp_path):
    """Write a study, with some of its lines replaced, and read it."""

    def read(**changes: str):
        text = FILE
        for old, new in changes.pop("lines", {}).items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "study.toml"
        path.write_text(text)
        return read_study(path)

    return read


def test_a_whole_file(study):
    found = study()
    assert (found.compare.seeds, found.compare.tuning_seeds, found.compare.eval_images) == ((1, 2), (101,), 5_000)
    assert found.stages == {"flat": "digits", "under": "runs/backbone"}
    dmp, full, on = found.variants.values()
    assert dmp.choices() == [{"prompt_lr": p, "gate_lr": g} for p in (1e-3, 1e-2) for g in (1e-3, 1e-4)]
    assert (full.choices(), full.at("flat"), full.at("under"), dmp.at("under")) == ([{}], True, False, True)
    assert (on.goes_on, dmp.goes_on) == (True, False)
    assert found.compare.tune_stage is None
    tuned = study(lines={"tuning_seeds": 'tune-stage = "flat"\ntuning_seeds'})
    assert tuned.compare.tune_stage == "flat"


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("[compare]", "[compaer]", ("compaer is no table of a study (did you mean compare?)",)),
        ("tuning_seeds", "tuning_seed", ("[compare]: tuning_seed is no setting (did you mean tuning_seeds?)",)),
        ("iters = 7", "itres = 7", ("[settings]: itres is no setting (did you mean iters?)",)),
        ('method = "dmp"', 'methud = "dmp"', ("[variants.dmp]: methud is no setting (did you mean method?)",)),
        ("continue = true", "contineu = true", ("[variants.trained-on]: contineu is no setting (did you mean continue?)",)),
        ("tune.gate_lr", "tune.gate_rl", ("[variants.dmp] tune: gate_rl is no setting (did you mean gate_lr?)",)),
        ('against = ["dmp"]', 'against = ["dnp"]', ("[compare] against: dnp is no variant (did you mean dmp?)",)),
        ('stages = ["flat"]', 'stages = ["flet"]', ("[variants.full] stages: flet is no stage (did you mean flat?)",)),
        ("tuning_seeds", 'tune_stage = "flatt"\ntuning_seeds', ("[compare] tune_stage: flatt is no stage (did you mean flat?)",)),
        ("tuning_seeds = [101]", "tuning_seeds = [2, 101]", ("[compare]: seed 2 is in seeds and in tuning_seeds",)),
        ("seeds = [1, 2]", "seeds = [1, 1]", ("[compare]: seeds holds a value twice",)),
        ("seeds = [1, 2]", "seeds = []", ("[compare]: seeds takes a list of one or more values",)),
        ("seeds = [1, 2]", "seeds = [-1]", ("[compare]: seeds.0 takes a list of ", "found -1")),
        ('run = "runs/study"', "", ("[compare]: run is missing",)),
        ("tuning_seeds = [101]", "", ("[variants.dmp]: tune needs tuning_seeds",)),
        ("tuning_seeds", "eval_images = 1\ntuning_seeds", ("eval_images 1 is no sample",)),
        ('flat = "digits"', "flat = 3", ("[stages]: flat: found 3",)),
        ("[variants.full]", "[variants.'a/b']", ("'a/b' cannot be the name of a variant",)),
        ("[variants.full]", "[variants.backbone]", ("'backbone' cannot be the name of a variant",)),
        ("iters = 7", "seed = 7", ("[settings]: seed is set by compare itself",)),
        ("iters = 7", "device = 'cpu'", ("[settings]: device is given on the command line",)),
        ("iters = 7", "json = true", ("[settings]: json is given on the command line",)),
        ("iters = 7", "base = 'digits'", ("[settings]: base is what [stages] is for",)),
        ("iters = 9", "steps = 9", ("[variants.full]: steps is the same for all variants",)),
        ("iters = 9", "batch-size = 8\nbatch_size = 9", ("[variants.full]: batch_size is there twice",)),
        ("continue = true", "continue = true\nema = 0.9", ("ema cannot be set beside continue",)),
        ("continue = true", "continue = true\ntune.iters = [1, 2]", ("iters cannot be set beside continue",)),
        (
            "tune.gate_lr = [1e-3, 1e-4]",
            "tune.gate_lr = []",
            ("[variants.dmp]: tune.gate_lr takes a table, each value a list of one",),
        ),
    ],
)
def test_what_is_wrong_is_one_sentence_with_file_and_key(study, tmp_path, old, new, parts):
    with pytest.raises(UsageError) as failure:
        study(lines={old: new})
    message = f"{failure.value.message} ({failure.value.hint})"
    assert message.startswith(str(tmp_path / "study.toml"))
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_a_variant_is_tuned_where_it_is_run(study):
    lines = {"tuning_seeds": 'tune_stage = "under"\ntuning_seeds', "tune.gate_lr": 'stages = ["flat"]\ntune.gate_lr'}
    with pytest.raises(UsageError, match="it is tuned at stage under, which is not among its stages"):
        study(lines=lines)


def test_no_file_no_toml_no_tables(tmp_path):
    with pytest.raises(MissingError, match="is not there"):
        read_study(tmp_path / "none.toml")
    path = tmp_path / "x.toml"
    for text, message in (("[compare", "not valid TOML"), ("", r"has no \[compare\]")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_study(path)


def test_all_that_the_file_may_not_set_are_options_of_patch():
    assert set(OURS) - {"json_output"} <= {option.public for option in options_of("patch").values()}


def test_preset_then_settings_then_variant_then_choice(study, monkeypatch):
    monkeypatch.setenv("DMPCTL_BATCH_SIZE", "99")  # has no say: the file is the whole experiment
    found = study()
    flat = settings_of(found, "flat", "full", seed=5)
    assert (flat.train.iters, flat.train.batch_size, flat.run.seed) == (9, 8, 5)
    assert (flat.sampling.sampler, flat.train.ema) == ("ddim", 0.999)  # preset digits, for the bundled backbone
    assert (flat.evaluate.evaluate, flat.save.keep_last, flat.base.base) == (False, 1, "digits")
    tuned = settings_of(found, "under", "dmp", {"prompt_lr": 0.5, "gate_lr": 0.25})
    assert (tuned.method.prompt_lr, tuned.method.gate_lr, tuned.train.iters) == (0.5, 0.25, 7)
    assert (tuned.sampling.sampler, tuned.base.base) == ("ddpm", "runs/backbone")  # no preset
    assert settings_of(found, "flat").train.iters == 7


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("iters = 9", "iters = 0", "[variants.full]: iters takes a whole number of 1 or more, found 0"),
        ('method = "full"', 'method = "ful"', "[variants.full]: method takes one of dmp, prompt, lora or full, found 'ful'"),
        ("iters = 9", "topk = 3", "[variants.full]: topk belongs to method dmp, the chosen method is full"),
        ("iters = 9", "warmup = 8", "[variants.full]: warmup = 8 is longer than "),
    ],
)
def test_a_wrong_value_names_file_and_key(study, tmp_path, old, new, part):
    found = study(lines={old: new})
    with pytest.raises(UsageError) as failure:
        settings_of(found, "flat", "full")
    assert f"{tmp_path / 'study.toml'} {part}" in failure.value.message
