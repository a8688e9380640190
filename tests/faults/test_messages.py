"""Messages about a wrong line: which option, as it was written, what was found, what is allowed, what to type instead.

The options, their types and bounds are read from the settings, so that a new option is covered without a line here.
"""

import ast
import hashlib
import json
import re
import shlex
import tomllib
import traceback
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

import dmpctl
from dmpctl.cli.calls import own_hint
from dmpctl.cli.commands import COMMANDS
from dmpctl.errors import DmpError, MissingError, UsageError
from dmpctl.measuring import features
from dmpctl.models import codec
from dmpctl.models.codec import open_codec
from dmpctl.refusals import Among, Clash, Takes, synonyms
from dmpctl.settings.layers import resolve
from dmpctl.settings.measuring import Fid
from dmpctl.settings.methods import METHODS
from dmpctl.settings.options import Option, every_option, options_of
from dmpctl.store.locate import locate, locate_data, named
from tests.helpers import copied, files, patch_run
from tests.house import modules
from tests.latent_helpers import tiny_vae

JARGON = re.compile(
    r"Input should|[Vv]alue error|value_error|pydantic|typer|click|unable to|valid (integer|number|string|boolean|path|list)"
    r"|NoneType|<class|<function|object at|Traceback|internal|union_tag|finite_number|extra_forbidden|expected Of"
)
TALK = ("dmpctl reads", "dmpctl has", "dmpctl writes", "dmpctl cache")  # no commands, but sentences
FORMS = ("flag", "variable", "key", "argument")
HUGE = 10**30
PARTNERS = {"topk": {"gate": "topk"}, "num_heads": {"hidden_size": 24}, "hidden_size": {"num_heads": 1}}


@pytest.fixture
def spoken(cli):
    """Run a line that is to fail: (sentence, hint), both checked for their form."""

    def run(*argv: object, code: int = 2) -> tuple[str, str]:
        done = cli(*argv)
        lines = done.err.splitlines()
        assert (done.code, done.out) == (code, ""), (argv, done)
        assert not JARGON.search(done.err), done.err
        error, hint = lines[-2:]  # data that was opened before says what it is
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        return error[7:], hint[6:]

    return run


def kinds_of(option: Option) -> set[Any]:
    return {option.field.annotation, *get_args(option.field.annotation)} - {NoneType}


def bounds(option: Option) -> list[float]:
    """Numbers that lie just outside of what the option takes."""
    step = 1 if int in kinds_of(option) else 1e-6
    ends = (("ge", -step), ("gt", 0.0), ("le", step), ("lt", 0.0))
    return [getattr(mark, name) + beyond for mark in option.field.metadata for name, beyond in ends if hasattr(mark, name)]


def wrong_values(option: Option, form: str) -> list[Any]:
    """A wrong value of every class: of another type, out of range, no choice, a fraction for a whole number, empty."""
    marks, kinds = option.field.metadata, kinds_of(option)
    if bool in kinds:
        return [] if form == "flag" else ["maybe", "2"] if form == "variable" else ["maybe", 7, "", [True]]
    typed: list[Any] = ["zzz"] if option.choices or int in kinds or float in kinds else []
    if int in kinds:
        typed += ["1.5", "nan", HUGE, *bounds(option)]
    if float in kinds:
        typed += ["nan", "inf", *bounds(option)]
    typed += ["?!"] if any(isinstance(mark, Takes | Among) for mark in marks) else []
    typed += [""] if form != "variable" else []  # an empty variable is unset
    if form in ("flag", "variable"):
        return list(map(str, typed))
    other = [[1, 2], {"a": 1}]
    other += [True] if int in kinds or float in kinds else [7] if not option.choices else []
    return [*typed, *other, *(["a\0b"] if str in kinds or Path in kinds else [])]


def refused(command: str, option: Option, value: Any, form: str, monkeypatch, place: Path) -> tuple[str, str, str]:
    """Name, sentence and hint of a refusal of one value, given in one way."""
    own = [method for method, kind in METHODS.items() if option.name in kind.model_fields]
    given: dict[str, Any] = {"method": own[0]} if own and command == "patch" and option.name != "method" else {}
    config, name = None, option.flag
    if form == "variable":
        monkeypatch.setenv(option.variable, value)
        name = option.variable
    elif form == "key":
        config = place / "x.toml"
        text = re.sub(r'"(\w+)": ', r"\1 = ", json.dumps(value)) if isinstance(value, dict) else json.dumps(value)
        config.write_text(f"[{command}]\n{option.public} = {text}\n")
        name = f"{config} [{command}]: {option.public}"
    else:
        given, name = given | {option.name: value}, option.public if form == "argument" else name
    try:
        with pytest.raises(UsageError) as caught:
            resolve(command, given, config, python=form == "argument")
    except BaseException as error:
        raise AssertionError(f"{command} {name} takes {value!r}: {error}") from None
    finally:
        monkeypatch.delenv(option.variable, raising=False)
    return name, caught.value.message, caught.value.hint or ""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_wrong_value_of_every_option_is_refused_by_name(command, form, monkeypatch, tmp_path):
    flags = {flag for option in options_of(command).values() for flag in (option.flag, option.off)}
    for option in options_of(command).values():
        for value in wrong_values(option, form):
            if option.name == "encode_with" and not isinstance(value, str):
                continue
            name, sentence, hint = refused(command, option, value, form, monkeypatch, tmp_path)
            assert sentence.startswith(name), sentence
            assert repr(value)[:60] in sentence, sentence
            assert not JARGON.search(sentence + hint), sentence
            assert hint, sentence
            assert "\n" not in sentence + hint
            assert set(re.findall(r"--[a-z0-9][\w-]*", hint)) <= flags, hint
            assert form == "flag" or "--" not in hint, hint


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_hint_says_is_taken_when_typed(command, monkeypatch, tmp_path):
    for option in options_of(command).values():
        for value in wrong_values(option, "flag"):
            _, sentence, hint = refused(command, option, value, "flag", monkeypatch, tmp_path)
            if not hint.startswith("say "):
                assert hint.startswith(f"leave {option.flag} out")
                continue
            flag, better = shlex.split(hint.removeprefix("say ").partition(", or ")[0])
            assert flag == option.flag
            own = [each for each, kind in METHODS.items() if command == "patch" and option.name in kind.model_fields]
            own = own if option.name != "method" else []
            alone = {**({"method": own[0]} if own else {}), **PARTNERS.get(option.name, {}), option.name: better}
            assert resolve(command, alone), sentence


@pytest.mark.parametrize(
    ("line", "sentence", "hint"),
    [
        ("patch --iters abc", "--iters takes a whole number of 1 or more, found 'abc'", "say --iters 50000"),
        ("patch --steps 20.5", "--steps takes a whole number from 1 to 1000, found '20.5'", "say --steps 20,"),
        ("sample r --steps 1001", "from 1 to 1000, found '1001'", "say --steps 1000,"),
        ("sample r --sampler DDIM", "found 'DDIM'", "say --sampler ddim,"),
        ("patch --preset dmpplus", "auto, dmp, dmp-code, dmp+ or digits, found 'dmpplus'", "say --preset dmp+,"),
        ("fid r --metrics fdi", "or several joined by commas, found 'fdi'", "say --metrics fid,"),
        ("fid r --metrics fid,kdi", "found 'fid,kdi'", "say --metrics fid,kid,"),
        ("patch --lr 0.001", "--lr belongs to method lora or full, the chosen method is dmp", "say --prompt-lr or --gate-lr,"),
        ("patch --prompts 4 --method lora", "--prompts belongs to method dmp or prompt", "add --method dmp"),
        ("patch --gate-lr 1 --preset dmp+", "--gate-lr belongs to method dmp, the chosen method is prompt", "add --method dmp"),
        ("patch --iters", "--iters takes a whole number of 1 or more, nothing follows it", "say --iters 50000"),
        (
            "patch --iters --batch-size 3",
            "--iters takes a whole number of 1 or more, found '--batch-size'",
            "before --batch-size",
        ),
        ("patch --method", "--method takes dmp, prompt, lora or full, nothing follows it", "say --method dmp"),
        ("patch --json=1", "--json takes no value", "say --json or --no-json"),
        ("patch --hflip true", "--hflip takes no value, found true", "say --hflip or --no-hflip"),
        ("patch photos", "dmpctl patch takes no argument, found photos", "say --data photos or --base photos"),
        ("pretrain photos", "dmpctl pretrain takes no argument, found photos", "say --data photos"),
        ("fid a b", "dmpctl fid takes one argument, WHAT, found also b", "say --reference b or --versus b"),
        ("sample a b", "takes one argument, RUN", "or --out b"),
        ("doctor now", "dmpctl doctor takes no argument, found now", "leave now out"),
        ("sample", "dmpctl sample needs RUN", "such as: dmpctl sample runs/digits"),
        ("compare", "dmpctl compare needs FILE", "such as: dmpctl compare "),
        ("sample ''", "RUN is empty", "dmpctl sample --help"),
        ("fid ''", "WHAT is empty", "dmpctl fid --help"),
        ("ptch", "there is no command ptch", "did you mean patch?"),
        ("train", "there is no command train", "did you mean dmpctl patch?"),
        ("--debug patch", "no option --debug before the command", "dmpctl patch --debug"),
        ("-V", "no option -V before the command", "dmpctl --version"),
        ("--verson", "no option --verson", "did you mean --version?"),
    ],
)
def test_a_wrong_line(line, sentence, hint, spoken):
    said, then = spoken(*shlex.split(line))
    assert sentence in said
    assert hint in then


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("sample r --class 3", ["--label"]),
        ("sample r --classes 3", ["--label"]),
        ("patch --gpus 2", ["--num-processes"]),
        ("patch -o x", ["--run"]),
        ("sample r --output x", ["--out"]),
        ("patch --batch 8", ["--batch-size", "--sample-batch"]),
        ("sample r --batch 8", ["--sample-batch"]),
        ("patch --epochs 3", ["--iters"]),
        ("sample r --seed 3", ["--sample-seed"]),
        ("patch --learning-rate 1", ["--prompt-lr", "--gate-lr", "--lr"]),
        ("pretrain --learning-rate 1", ["--lr"]),
        ("sample r --guidance-scale 2", ["--cfg"]),
        ("sample r --num-samples 4", ["--num-images"]),
        ("patch --model x", ["--base", "--weights"]),
        ("patch --data-dir x", ["--data"]),
        ("patch --fp16", ["--precision", "--sample-precision"]),
        ("patch --no-evalute", ["--no-evaluate"]),
        ("patch --Iters 3", ["--iters"]),
        ("patch --batch_size 3", ["--batch-size"]),
        ("patch --conf x", ["--config"]),
    ],
)
def test_an_option_by_another_name(line, meant, spoken):
    said, hint = spoken(*shlex.split(line))
    assert shlex.split(line)[-1 if line.endswith("fp16") else -2 if "no-" not in line else -1] in said
    assert re.findall(r"--[\w-]+", hint) == meant


def test_every_other_name_leads_to_an_option_and_hides_none():
    public = {*every_option(), "config"}
    assert {name for names in synonyms("options").values() for name in names} <= public
    for command in COMMANDS:
        for word, names in synonyms("options").items():
            own = {option.public for option in options_of(command).values()}
            assert word not in own or word in names or not set(names) & own or word in ("images",), (command, word)


def test_help_is_asked_for_by_one_letter(cli):
    assert cli("patch", "-h").out == cli("patch", "--help").out
    assert cli("-h").code == 0


@pytest.mark.parametrize(("typed", "value"), [("1e3", 1000), ("1000.0", 1000), ("1_000", 1000), (" 7 ", 7)])
def test_a_whole_number_may_be_written_in_other_ways(typed, value):
    assert resolve("patch", {"iters": typed}).settings.train.iters == value


def test_lists_of_names_may_be_toml_lists(tmp_path):
    (tmp_path / "x.toml").write_text('metrics = ["fid", "kid"]\n')
    assert resolve("fid", {}, tmp_path / "x.toml").settings.fid.wanted == ("fid", "kid")


# Values that do not go together: the options of a line, and those that the hint has to name
CLASHES = [
    ("pretrain", {"hidden_size": 30, "num_heads": 4}),
    ("pretrain", {"class_conditional": True, "text_conditional": True}),
    ("pretrain", {"text_conditional": True, "schedule": "flow"}),
    ("pretrain", {"size": 7, "patch_size": 2}),
    ("patch", {"cpu": True, "device": "cuda"}),
    ("patch", {"nnodes": "3:2"}),
    ("patch", {"nnodes": "2"}),
    ("patch", {"prompt_depth": 1, "prompt_sites": "0"}),
    ("patch", {"sites": "mid", "prompt_depth": 1}),
    ("patch", {"sites": "mid", "prompt_sites": "0"}),
    ("patch", {"gate": "topk"}),
    ("patch", {"topk": 8}),
    ("patch", {"gate": "hard", "topk": 8}),
    ("patch", {"gate": "topk", "topk": 8, "prompts": 4}),
    ("patch", {"gate": "topk", "topk": 3, "prompt_sets": 2}),
    ("patch", {"gate_per_site": True, "gate": "uniform"}),
    ("patch", {"warmup": 100, "iters": 10}),
    ("fid", {"versus": "a", "fail_unless_better_than": "b"}),
    ("sample", {"prompt": "a", "prompts_from": "b"}),
    ("download", {"list_assets": True, "verify": True}),
    ("download", {"encode_with": "true"}),
    ("patch", {"allow_change": "promt_lr"}),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("command", "values"), CLASHES)
def test_values_that_do_not_go_together_are_named_as_they_were_written(command, values, form, monkeypatch, tmp_path):
    options, config, given = options_of(command), None, {}
    for name, value in values.items():
        if form == "variable":
            monkeypatch.setenv(options[name].variable, str(value))
    if form == "key":
        config = tmp_path / "x.toml"
        config.write_text("".join(f"{options[name].public} = {json.dumps(value)}\n" for name, value in values.items()))
    if form in ("flag", "argument"):
        given = values
    with pytest.raises(UsageError) as caught:
        resolve(command, given, config, python=form == "argument")
    sentence, hint = caught.value.message, caught.value.hint or ""
    for name in values if len(values) < 3 else set(values) - {"gate"}:
        assert options[name].written.named(form) in sentence, sentence
        assert form != "key" or str(config) in sentence
    assert not JARGON.search(sentence + hint)
    assert set(re.findall(r"--[a-z0-9][\w-]*", hint)) <= {option.flag for option in options.values()}
    assert any(option.written.named(form) in hint for option in options.values()), hint
    assert form == "flag" or "--" not in hint


@pytest.mark.parametrize(("command", "values"), CLASHES)
def test_a_hint_about_values_that_do_not_go_together_leads_out(command, values):
    flags = {option.flag: name for name, option in options_of(command).items()}
    then = dict(values)
    for _ in range(2 if "nnodes" in values else 1):  # machines that are in order need a place to meet
        with pytest.raises(UsageError) as caught:
            resolve(command, then)
        words = shlex.split((caught.value.hint or "").replace(",", " ").replace(";", " "))
        if words[0] == "leave":
            del then[flags[words[1].rstrip(":")]]
        else:
            assert words[0] in ("say", "add")
            then[flags[words[1]]] = words[2]
        if "rdzv_endpoint" in then:
            break
    assert resolve(command, then)


def test_every_clash_of_the_settings_is_in_the_list_above(monkeypatch):
    seen, init = set(), Clash.__init__

    def recorded(self, *args):
        frame = traceback.extract_stack()[-2]
        seen.add((Path(frame.filename).stem, frame.lineno))
        init(self, *args)

    monkeypatch.setattr(Clash, "__init__", recorded)
    for command, values in CLASHES:
        with pytest.raises(UsageError):
            resolve(command, values)
    raised = {
        (module.rpartition(".")[2], node.lineno)
        for module, source in modules().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Clash"
    }
    assert raised == seen
    plain = [
        f"{module}: {line}"
        for module, source in modules().items()
        if ".settings." in module
        for line in source.splitlines()
        if "raise ValueError" in line and not module.endswith((".assets", ".study"))
    ]
    assert plain == []


def test_every_flag_and_command_that_the_package_names_exists():
    """In all texts of the package, so in every hint: no `--flag` that no command has, no `dmpctl COMMAND` that is none."""
    flags = {flag for command in COMMANDS for option in options_of(command).values() for flag in (option.flag, option.off)}
    flags |= {"--config", "--help", "--version"}
    wrong = []
    for module, source in modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?<![\w-])--[a-z][a-z0-9]+(?:-[a-z0-9]+)*(?![\w-])", node.value)
                called = re.findall(r"(?<![\w/.])dmpctl ([a-z][a-z-]+)(?= |$|\b)", node.value) if "`" not in node.value else []
                wrong += [(module, word) for word in named if word not in flags]
                wrong += [
                    (module, f"dmpctl {word}") for word in called if f"dmpctl {word}" in node.value and word not in COMMANDS
                ]
    assert [each for each in wrong if each[1] not in TALK] == []


# In Python


@pytest.mark.parametrize(
    ("call", "sentence", "hint"),
    [
        (lambda run: dmpctl.sample(run, 1, stps=3), "sample() has no option stps", "did you mean steps?"),
        (lambda run: dmpctl.sample(run, 1, num_images=3), "sample() has no option num_images", ""),
        (lambda run: dmpctl.sample(run, 1, guidance_scale=3), "sample() has no option guidance_scale", "did you mean cfg?"),
        (lambda run: dmpctl.train(run, gate_lrr=3), "train() has no option gate_lrr", "did you mean gate_lr?"),
        (lambda run: dmpctl.train(run, epochs=3), "train() has no option epochs", "did you mean iters?"),
        (lambda run: dmpctl.measure(run, metric="fid"), "measure() has no option metric", "did you mean metrics?"),
        (lambda run: dmpctl.sample(run, -1), "count takes a whole number of 1 or more, found -1", "count=4"),
        (lambda run: dmpctl.sample(run, 0), "found 0", "count=4"),
        (lambda run: dmpctl.sample(run, 1.5), "found 1.5", "count=4"),
        (lambda run: dmpctl.sample(run, True), "found True", "count=4"),
        (lambda run: dmpctl.sample(run, "many"), "found 'many'", "count=4"),
        (lambda run: dmpctl.sample(run, 1, steps=0), "steps takes a whole number from 1 to 1000, found 0", "say steps=1"),
        (lambda run: dmpctl.sample(run, 1, steps=None), "steps takes a whole number from 1 to 1000, found None", "say steps="),
        (lambda run: dmpctl.sample(run, 1, sampler="dddm"), "sampler takes one of ddpm, ", "say sampler='ddpm'"),
        (lambda run: dmpctl.sample(run, 1, label=-1), "label takes a whole number of 0 or more, found -1", "say label=0"),
        (lambda run: dmpctl.sample(None, 1), "model takes the path of a run, or", "found None"),
        (lambda run: dmpctl.sample(3, 1), "model takes the path of a run, or", "found 3"),
        (lambda run: dmpctl.load_patch(3), "run takes a path or a name, found 3", "run="),
        (lambda run: dmpctl.load_backbone(3), "name takes a path or a name, found 3", "name="),
        (lambda run: dmpctl.measure(3), "what takes a path or a name, found 3", "what="),
        (lambda run: dmpctl.train(""), "run takes a path or a name, found ''", "run="),
        (lambda run: dmpctl.apply(SimpleNamespace(), 3), "patch takes the path of a run, or", "found 3"),
        (lambda run: dmpctl.train(run, gate="topk"), "gate='topk' needs topk", "add topk='8'"),
    ],
)
def test_a_wrong_call(call, sentence, hint, finished):
    with pytest.raises(DmpError) as caught:
        call(finished)
    said = f"{caught.value.message} | {caught.value.hint}"
    assert caught.value.hint
    assert sentence in said
    assert hint in said
    assert not JARGON.search(said)
    assert "--" not in said or "--help" in said


def test_the_path_of_a_run_stands_for_its_patch(finished):
    few = {"sampler": "ddim", "steps": 2, "cpu": True}
    images = dmpctl.sample(dmpctl.load_patch(finished), np.int64(2), **few)
    for path in (finished, str(finished), finished / "patch.safetensors"):
        assert torch.equal(dmpctl.sample(path, 2, **few), images)
    assert torch.equal(dmpctl.sample(dmpctl.apply(dmpctl.load_backbone(), finished), 2, **few), images)


# A run by one of its files


@pytest.mark.parametrize("name", ["patch.safetensors", "patch.json", "config.json", "checkpoints/step-0000003/patch.safetensors"])
@pytest.mark.parametrize(
    "line",
    [
        ("sample", "--num-images", 1, "--steps", 2, "--sampler", "ddim"),
        ("fid", "--max-images", 80, "--steps", 2, "--sampler", "ddim", "--dry-run"),
        ("inspect-gates", "--no-plot", "--timesteps", 2),
        ("export", "--to", "patch"),
        ("report", "--out"),
        ("push", "hf://me/digits"),
    ],
    ids=lambda line: line[0],
)
def test_a_run_may_be_named_by_a_file_in_it(line, name, finished, tmp_path, cli, monkeypatch):
    run, other = copied(finished, tmp_path / "run"), copied(finished, tmp_path / "other")
    command, *options = line
    options += [tmp_path / "page.html"] if command == "report" else []
    options += ["--dry-run"] if command == "push" else ["--cpu"] if command in ("sample", "fid", "inspect-gates") else []
    by_file = cli(command, run / name, *options, "--quiet")
    by_name = cli(command, (other / name).parent, *options, "--quiet")
    assert by_file.code == by_name.code, by_file.err
    assert by_file.err.replace(str(run), str(other)) == by_name.err
    assert by_file.code == 0 or "checkpoints" in name
    assert files(run) == files(other)


# What goes together across commands


def test_names_of_settings_that_may_change_are_names_of_settings(spoken, tmp_path):
    for command in ("patch", "pretrain"):
        sentence, hint = spoken(command, "--allow-change", "promt_lr" if command == "patch" else "batch-sise", "--dry-run")
        assert sentence.startswith("--allow-change ")
        assert hint == f"say --allow-change {'prompt_lr' if command == 'patch' else 'batch_size'}"
    assert "foo" in spoken("patch", "--allow-change", "foo")[0]
    assert resolve("patch", {"allow_change": "prompt-lr,data_fingerprint,iters"}).settings.run.allowed[0] == "prompt_lr"


def test_another_method_in_a_run_is_named_first_and_alone(finished, tmp_path, spoken):
    run = copied(finished, tmp_path / "run")
    few = ("--iters", 6, "--batch-size", 8, "--cpu", "--no-evaluate", "--ema", 0)
    sentence, _ = spoken("patch", "--method", "lora", "--run", run, *few)
    assert f"{run} already uses different settings (method: dmp there, lora now)" == sentence


def test_merged_weights_are_sampled_beside_the_run_and_under_their_own_name(tmp_path, cli):
    patch_run(tmp_path / "lora", method="lora", iters=3)
    before = files(tmp_path / "lora")
    merged = tmp_path / "lora.safetensors"
    assert cli("export", tmp_path / "lora", "--out", merged).code == 0
    line = ("--num-images", 2, "--steps", 2, "--sampler", "ddim", "--cpu")
    assert cli("sample", merged, *line).code == 0
    assert files(tmp_path / "lora") == before
    (made,) = (tmp_path / "lora-merged" / "samples").iterdir()
    assert made.name.endswith("-merged-lora")
    assert cli("sample", tmp_path / "lora", *line, "--unpatched").code == 0
    assert next((tmp_path / "lora" / "samples").iterdir()).name.endswith("-backbone")


def test_what_patch_measured_is_shown(tmp_path, cli):
    small = ("--iters", 2, "--batch-size", 8, "--cpu", "--eval-images", 80, "--steps", 2, "--sampler", "ddim")
    assert cli("patch", "--run", tmp_path / "run", *small).code == 0
    (path,) = (tmp_path / "run" / "metrics").glob("comparison-*.json")
    found = json.loads(path.read_text("utf-8"))
    shown = cli("fid", tmp_path / "run", "--show", "--json")
    assert shown.code == 0, shown.err
    compared = json.loads(shown.out)["comparisons"][0]
    assert compared["patched"]["value"] == found["patched"]["value"]
    table = cli("fid", tmp_path / "run", "--show").out
    assert f"{found['patched']['value']:.4f}" in table
    assert f"{found['backbone']['value']:.4f}" in table


@pytest.mark.parametrize("command", ["export", "inspect-gates", "sample"])
def test_a_patch_on_the_hub_that_was_not_fetched_is_called_by_its_address(command, spoken, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sentence, hint = spoken(command, "hf://a/b", code=3)
    assert "hf://a/b" in sentence
    assert "there is no run" not in sentence
    assert "dmpctl download" in hint


def test_a_hint_names_no_option_that_the_command_lacks(spoken, tmp_path):
    for number, size in enumerate((32, 48, 48)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{number}.png")
    sentence, hint = spoken("fid", tmp_path, "--reference", "digits", "--extractor", "pixels")
    assert "come at 8x8 pixels only" in sentence
    assert "--size" not in hint or "dmpctl fid has no --size" in hint


def test_a_hint_keeps_the_ways_out_that_there_are():
    assert own_hint("repair it, take it away, or go on without it: --on-bad skip", "sample") == "repair it, or take it away"
    assert own_hint("say --size N to crop and resize them", "fid") == "change the files themselves: dmpctl fid has no --size"
    assert own_hint("say --size N to crop and resize them", "pretrain") == "say --size N to crop and resize them"
    assert own_hint("dmpctl download ffhq --latents vae-ema", "patch") == "dmpctl download ffhq --latents vae-ema"
    assert own_hint(None, "fid") is None


def test_doctor_lists_every_package_that_is_needed(cli):
    project = tomllib.loads((Path(dmpctl.__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    names = {re.split(r"[^A-Za-z0-9_.-]", need)[0] for need in project["dependencies"]}
    assert names <= set(json.loads(cli("doctor", "--json").out)["versions"])


# Rows of the user's own


def test_a_row_of_the_users_own_may_be_named_as_codec_and_as_text_encoder(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    tiny_vae(folder)
    rows = "".join(
        f'[assets.{name}]\nrepo = "me/{name}"\nfile = "config.json"\nkind = "{kind}"\n'
        for name, kind in (("my-vae", "codec"), ("my-text", "text"), ("my-net", "backbone"))
    )
    (tmp_path / "x.toml").write_text(rows)
    settings = resolve("patch", {"codec": "my-vae"}, tmp_path / "x.toml").settings
    assert {"my-vae"} <= set(named("codec", settings)) - set(named("codec"))
    assert {"my-text"} <= set(named("text", settings)) - set(named("text"))
    for kind, name in (("codec", "my-vae"), ("text", "my-text")):
        with pytest.raises(MissingError, match=f"{name}.* is not in the cache"):
            locate(name, kind, settings)
    with pytest.raises(UsageError, match="my-net is a row of kind backbone, no codec"):
        locate("my-net", "codec", settings)
    monkeypatch.setattr(codec, "locate", lambda *_: folder)
    assert open_codec(settings, 4).name == str(folder)  # its name means nothing to who has not this file


def test_a_row_of_the_users_own_is_the_inception_that_measures(tmp_path, monkeypatch, random_inception):
    weights = tmp_path / "own.pth"
    weights.write_bytes(random_inception.read_bytes())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (tmp_path / "x.toml").write_text(
        f'[assets.inception]\nurl = "https://host.example/own.pth"\nkind = "extractor"\nsha256 = "{digest}"\n'
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = resolve("fid", {}, tmp_path / "x.toml").settings
    asked = []
    monkeypatch.setattr(features, "require", lambda name, given: asked.append((name, given)) or weights)
    found = features.build_extractor(Fid(extractor="inception"), (3, 64, 64), torch.device("cpu"), settings)
    assert asked == [("inception", settings)]
    assert not found.known


def test_a_row_of_the_users_own_is_what_is_streamed(tmp_path):
    (tmp_path / "x.toml").write_text(
        '[assets.ffhq]\nrepo = "me/ffhq"\nallow = ["*"]\ndataset = true\nkind = "data"\nrevision = "v2"\n'
    )
    settings = resolve("patch", {"data": "ffhq"}, tmp_path / "x.toml").settings
    found = locate_data("ffhq", settings, streaming=True)
    assert (found.at.repo, found.at.revision) == ("me/ffhq", "v2")
    assert locate_data("ffhq", streaming=True).at.repo != "me/ffhq"
