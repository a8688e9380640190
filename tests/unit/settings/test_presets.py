"""The recipes fit the options, and `dmp` is what was published."""

import pytest

from dmpctl.settings.layers import resolve
from dmpctl.settings.methods import METHODS
from dmpctl.settings.options import options_of
from dmpctl.settings.presets import PRESETS, chosen_preset


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_options_of_patch_with_values_they_take(name, method):
    values = PRESETS[name].of(method)
    assert set(values) <= set(options_of("patch"))
    resolved = resolve("patch", {"preset": name, "method": method})
    for option in values:
        assert resolved.origins[option] == f"preset {name}"


@pytest.mark.parametrize("name", PRESETS)
def test_what_only_one_method_has_is_given_to_that_one_alone(name):
    for method, values in PRESETS[name].methods.items():
        assert set(values) <= set(METHODS[method].model_fields)


def test_a_preset_names_its_method_where_no_one_else_does():
    resolved = resolve("patch", {"preset": "dmp+"})
    assert resolved.settings.method.method == "prompt"
    assert resolved.origins["method"] == "preset dmp+"
    assert resolved.settings.objective.timestep_sampling == "importance"
    given = resolve("patch", {"preset": "dmp+", "method": "lora"})
    assert given.settings.method.method == "lora"
    assert given.settings.method.lr == 3e-3
    assert resolve("patch", {"preset": "dmp"}).settings.method.method == "dmp"


def test_every_preset_can_be_chosen():
    assert set(options_of("patch")["preset"].choices) == {"auto", *PRESETS}


def test_the_papers_text_and_its_code_differ_in_the_balance_alone():
    paper, code = (resolve("patch", {"preset": name}).settings for name in ("dmp", "dmp-code"))
    changed = {"method": paper.method.model_copy(update={"balance": "per-sample"})}
    changed["base"] = paper.base.model_copy(update={"preset": "dmp-code"})
    assert code == paper.model_copy(update=changed)


def test_the_papers_recipe():
    settings = resolve("patch", {"preset": "dmp"}).settings
    method, train = settings.method, settings.train
    assert (method.prompts, method.gate, method.topk, method.gate_scale) == (None, "soft", None, 1.0)
    assert (method.prompt_sets, method.prompt_rank, method.gate_per_site, method.prompt_init) == (None, None, False, "zero")
    assert (method.balance, method.importance_weight, method.load_weight) == ("shazeer", 1.0, 1.0)
    assert (method.prompt_lr, method.gate_lr) == (1e-4, 1e-3)
    assert (train.iters, train.batch_size, train.ema, train.lr_schedule, train.warmup) == (50_000, 128, 0.0, "constant", 0)
    assert (train.beta1, train.beta2, train.weight_decay) == (0.9, 0.999, 0.0)
    assert settings.data.hflip is True


@pytest.mark.parametrize(
    ("preset", "base", "chosen"),
    [
        ("auto", "digits", "digits"),
        ("auto", "DiT-L/2", None),
        ("dmp", "digits", "dmp"),
        ("digits", "x.pt", "digits"),
        ("dpm", "digits", None),
    ],
)
def test_auto_follows_the_backbone(preset, base, chosen):
    assert chosen_preset(preset, base) == chosen


def test_no_preset_and_no_such_method_give_nothing():
    assert chosen_preset("auto", "DiT-L/2") is None
    assert PRESETS["digits"].of("dpm") == {}
