"""Names, help and cross-checks of every option."""

import inspect
import math
from typing import get_args

import pytest
from pydantic import ValidationError

from dmpctl.settings import exchange, measuring, methods, sections, training
from dmpctl.settings.measuring import Fid, Sampling
from dmpctl.settings.methods import METHODS, Dmp, Method, PromptMethod, PromptTuning
from dmpctl.settings.options import COMMANDS, every_option, options_of
from dmpctl.settings.sections import Data, Launch, Section, Shape, choices_of
from dmpctl.settings.training import Train

MODULES = (sections, methods, training, measuring, exchange)
CLASSES = {kind for module in MODULES for _, kind in inspect.getmembers(module, inspect.isclass)}
SECTIONS = sorted((kind for kind in CLASSES if issubclass(kind, Section) and kind is not Section), key=lambda kind: kind.__name__)
FIELDS = [(section, name, field) for section in SECTIONS for name, field in section.model_fields.items()]


def test_every_field_name_is_unique_across_sections_and_methods_share_only_what_means_the_same():
    methods = {*METHODS.values(), PromptMethod}
    names = [name for section, name, _ in FIELDS if section not in methods]
    assert len(names) == len(set(names))
    shared: dict[str, object] = {}
    for section, name, field in FIELDS:
        if section in methods and name != "method":
            assert name == "lr" or name not in names
            assert shared.setdefault(name, field.annotation) == field.annotation or name == "lr"


def test_every_field_of_every_section_is_offered_by_some_command():
    offered = {option.name for command in COMMANDS for option in options_of(command).values()}
    assert {name for _, name, _ in FIELDS} == offered


def test_public_names_are_unique_and_never_shadow_config():
    for command in COMMANDS:
        names = [option.public for option in options_of(command).values()]
        assert len(set(names)) == len(names)
        assert "config" not in names
    assert "json" in every_option()


@pytest.mark.parametrize("section", SECTIONS)
def test_help_is_a_sentence_and_an_absent_default_is_explained(section):
    for name, field in section.model_fields.items():
        assert (field.description or "").endswith("."), name
        assert field.default is not None or "default:" in field.description, name


@pytest.mark.parametrize("section", SECTIONS)
def test_defaults_are_valid(section):
    for name, field in section.model_fields.items():
        assert getattr(section(**{name: field.default}), name) == field.default, name


def test_free_names_are_fields():
    for section in SECTIONS:
        assert section.free <= set(section.model_fields)


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        (Dmp, {"gate": "topk"}, "gate topk needs topk"),
        (Dmp, {"topk": 4}, "topk 4 needs gate topk"),
        (Dmp, {"gate": "topk", "topk": 9, "prompts": 8}, "topk 9 is more than prompts 8"),
        (Dmp, {"gate": "topk", "topk": 3, "prompt_sets": 2}, "topk 3 is more than prompt_sets 2"),
        (Dmp, {"gate": "random", "gate_per_site": True}, "gate_per_site needs a gate that is trained, found gate random"),
        (Dmp, {"prompt_depth": 1, "prompt_sites": "0"}, "prompt_depth 1 and prompt_sites 0 both say"),
        (PromptTuning, {"prompt_depth": 1, "prompt_sites": "0"}, "prompt_depth 1 and prompt_sites 0 both say"),
        (Shape, {"hidden_size": 30, "num_heads": 4}, "hidden_size 30 is not a multiple of num_heads 4"),
        (Train, {"iters": 10, "warmup": 11}, "warmup 11 is longer than iters 10"),
        (Launch, {"cpu": True, "device": "cuda:1"}, "cpu and device cuda:1 contradict"),
    ],
)
def test_values_that_do_not_go_together(section, values, sentence):
    with pytest.raises(ValidationError, match=sentence):
        section(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"gate": "topk", "topk": 3, "prompts": 2, "prompt_sets": 4},
        {"gate": "topk", "topk": 8, "prompts": 8},
        {"gate": "topk", "topk": 4, "position": "prepend"},
        {"position": "prepend"},
    ],
)
def test_values_that_do_go_together(values):
    assert Dmp(**values)


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan", "inf"])
def test_no_number_is_infinite(value):
    with pytest.raises(ValidationError):
        Sampling(cfg=value)


def test_sections_are_frozen_and_refuse_unknown_names():
    with pytest.raises(ValidationError):
        Train().iters = 3
    with pytest.raises(ValidationError):
        Train(itrs=3)


def test_choices_of():
    assert choices_of(Data.model_fields["channels"].annotation) == (1, 3)
    assert choices_of(Fid.model_fields["protocol"].annotation) == ("adm", "pytorch-fid", "clean", "dinov2", "pixels")
    assert choices_of(int | None) == ()


def test_methods_are_listed_by_their_tag():
    assert METHODS["dmp"] is Dmp
    assert list(METHODS) == ["dmp", "prompt", "lora", "full"]
    assert get_args(Method) == tuple(METHODS.values())
