"""What always holds (numbers as in the list of invariants: 7 is in tests/unit/metrics, the gate of 5 in tests/unit/methods)."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from dmpctl.codecs.identity import Identity
from dmpctl.data.bundled import Digits
from dmpctl.errors import IntegrityError, Interrupted
from dmpctl.files import sha256_of
from dmpctl.models.backbone import load_backbone
from dmpctl.models.build import build_patch
from dmpctl.models.patch_files import load_patch, load_result
from dmpctl.models.patched import predict_patched
from dmpctl.runs import checkpoint
from dmpctl.runs.checkpoint import Saver
from dmpctl.runs.rundir import RunDir
from dmpctl.sampling import generate
from dmpctl.settings.methods import Dmp
from dmpctl.settings.sections import Base
from dmpctl.training import patch, pretrain
from dmpctl.types import Silent
from tests.helpers import (
    BUNDLED,
    SHAPE,
    SMALL,
    files,
    patch_run,
    pretrain_run,
    same_but_time,
    settings_for,
    tensors_of,
    trainer_of,
    tree,
)

CPU = torch.device("cpu")
PUBLISHED = ("patch.safetensors", "backbone.safetensors")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# 1


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("method", [Dmp(), Dmp(gate="topk", topk=3), Dmp(prompt_depth=2, gate_scale=16)])
def test_1_a_zero_patch_is_its_backbone_bit_for_bit(noisy, method):
    loaded = load_backbone(Base())
    fresh = build_patch(loaded.model, method)
    x, t = noise(32, *loaded.spec.latent_shape), torch.arange(0, 992, 31)
    gate_noise = noise(32, *fresh.noise_shape()) if noisy else None
    plain = loaded.model.denoise(x, t, None)
    found, routing = predict_patched(loaded.model, fresh.time_only, fresh, x, t, None, gate_noise)
    assert torch.equal(found, plain)
    spread = routing.gates.std(dim=1).max()
    assert spread > 0 if noisy else spread == 0  # the noise did reach the gates


def test_1_for_a_conditional_backbone_too(conditional):
    loaded = load_backbone(Base(base=str(conditional)))
    fresh = build_patch(loaded.model, Dmp())
    x, t, y = noise(11, 1, 8, 8), torch.arange(11) * 90, torch.arange(11)
    found, _ = predict_patched(loaded.model, fresh.time_only, fresh, x, t, y, noise(11, *fresh.noise_shape()))
    assert torch.equal(found, loaded.model.denoise(x, t, y))


# 2


@pytest.mark.parametrize("given", [{}, {"gate_noise": False}, {"gate": "topk", "topk": 4}, {"position": "prepend", "prompts": 3}])
def test_2_training_touches_the_patch_and_nothing_else(tmp_path, given):
    settings = settings_for("patch", run=tmp_path / "run", evaluate=False, **SMALL, **given)
    loaded, source = load_backbone(settings.base), Digits()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    session = patch.session_of(settings, loaded, Identity(), source)
    module = session.subject.module
    untrained = {name: value.clone() for name, value in module.state_dict().items()}
    with RunDir(tmp_path / "run") as run:
        trainer = trainer_of(session, settings, run)
        optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert len(optimised) == len({id(p) for p in optimised})
        assert {id(p) for p in optimised} == {id(p) for p in module.parameters() if p.requires_grad}
        trainer.train()
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and not p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, untrained[name])}
    assert {"prompt_embeddings", "gate.weight", "gate.bias"} <= moved


def test_2_a_backbone_that_did_change_is_noticed():
    loaded = load_backbone(Base())
    patch.refuse_changed_backbone(loaded)
    with torch.no_grad():
        loaded.model.final_layer.linear.bias[0] += 1e-6
    with pytest.raises(IntegrityError, match="the backbone changed while its patch was trained"):
        patch.refuse_changed_backbone(loaded)
    other = load_backbone(Base())
    other.model.blocks[0].attn.qkv.weight.requires_grad_(True)
    with pytest.raises(IntegrityError, match=r"blocks\.0\.attn\.qkv\.weight"):
        patch.refuse_changed_backbone(other)


# 3


@pytest.mark.parametrize(("sampler", "more"), [("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 1.0}), ("dpm-solver++", {})])
@pytest.mark.parametrize("which", ["patched", "conditional"])
def test_3_an_image_depends_on_its_seed_and_index_alone(finished, conditional, sampler, more, which):
    model = load_result(finished if which == "patched" else conditional)
    cfg = {} if which == "patched" else {"cfg": 1.5}
    sampling = settings_for("sample", sampler=sampler, steps=6, **more, **cfg).sampling

    def made(indices, batch: int) -> dict[int, torch.Tensor]:
        given = sampling.model_copy(update={"sample_batch": batch})
        parts = generate.in_batches(model, indices, given, CPU, Silent())
        return {k: image.int() for part, images in parts for k, image in zip(part, images, strict=True)}

    whole = made(range(16), 16)
    for indices, batch in ((range(16), 3), (range(16), 1), ([11, 2, 15], 2), ([7], 1)):
        for k, image in made(indices, batch).items():
            assert (image - whole[k]).abs().max() <= 1
    other = sampling.model_copy(update={"sample_seed": 1})
    assert (generate.generate(model, [7], other, CPU)[0].int() - whole[7]).abs().max() > 1
    assert all((whole[k] - whole[k + 1]).abs().max() > 1 for k in range(15))


# 4


class Cut(Silent):
    """Sends a signal at the end of one step (steps are counted by log lines: --log-every 1)."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number, self.done = step, number, 0

    def advance(self, by: int = 1, **figures: float) -> None:
        self.done += by
        if self.done == self.step:
            os.kill(os.getpid(), self.number)


def same_run(one: Path, other: Path) -> None:
    """Equal weights, byte for byte, and equal metrics but for the clock."""
    for name in PUBLISHED:
        assert (one / name).is_file() == (other / name).is_file()
        if (one / name).is_file():
            assert sha256_of(one / name) == sha256_of(other / name)
    newest = [checkpoint.complete(run / "checkpoints")[-1] for run in (one, other)]
    assert newest[0].name == newest[1].name
    assert sha256_of(newest[0] / "trainer.safetensors") == sha256_of(newest[1] / "trainer.safetensors")
    assert same_but_time(RunDir(one).metrics.lines()) == same_but_time(RunDir(other).metrics.lines())


# 1797 digits in batches of 400: steps 4 and 8 lie across two epochs, and every stop is in the middle of one.
LONG = {"iters": 20, "batch_size": 400, "save_every": 7}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Twenty steps without a stop."""
    run = tmp_path_factory.mktemp("straight") / "run"
    patch_run(run, **LONG)
    return run


def test_4_ten_and_ten_are_twenty(tmp_path, straight):
    patch_run(tmp_path / "run", **LONG | {"iters": 10})
    half = sha256_of(tmp_path / "run" / "patch.safetensors")
    patch_run(tmp_path / "run", **LONG)
    same_run(tmp_path / "run", straight)
    assert half != sha256_of(straight / "patch.safetensors")
    assert [line["step"] for line in RunDir(straight).metrics.lines()] == list(range(1, 21))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_4_a_signal_in_the_middle_changes_nothing(tmp_path, straight, number):
    settings = settings_for("patch", **SMALL | LONG, run=tmp_path / "run", evaluate=False)
    with pytest.raises(Interrupted, match="saved at step 5") as failure:
        patch.patch(settings, Cut(5, number))
    assert failure.value.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}[number]
    assert failure.value.hint.startswith("go on with: dmpctl")
    assert not (tmp_path / "run" / "patch.safetensors").exists()
    patch.patch(settings, Silent())
    same_run(tmp_path / "run", straight)


def test_4_a_signal_at_the_last_step_is_resumed_to_a_finished_run(tmp_path, straight):
    settings = settings_for("patch", **SMALL | LONG, run=tmp_path / "run", evaluate=False)
    with pytest.raises(Interrupted, match="saved at step 20"):
        patch.patch(settings, Cut(20))
    report = patch.patch(settings, Silent())
    assert report.data["step"] == 20
    same_run(tmp_path / "run", straight)


def test_4_steps_after_the_last_checkpoint_are_taken_again(tmp_path, straight, monkeypatch):
    """As after a kill: stopped at step 12 with a checkpoint at step 7, and lines up to 12."""
    save = checkpoint.save

    def fail_at_14(folder, kind, weights, described, state, *keep):
        if state.step == 14:
            raise KeyboardInterrupt
        return save(folder, kind, weights, described, state, *keep)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", fail_at_14)
        patched.setattr(Saver, "check", Saver.finish)  # what fails in the background is heard of in the same step
        with pytest.raises(KeyboardInterrupt):
            patch_run(tmp_path / "run", **LONG)
    assert RunDir(tmp_path / "run").metrics.lines()[-1]["step"] == 14
    patch_run(tmp_path / "run", **LONG)
    same_run(tmp_path / "run", straight)


@pytest.mark.parametrize(
    "given", [{"ema": 0.9, "warmup": 3, "weight_decay": 0.1}, {"gate": "topk", "topk": 4, "grad_clip": 0.01}]
)
def test_4_whatever_the_recipe(tmp_path, given):
    patch_run(tmp_path / "straight", iters=8, **given)
    patch_run(tmp_path / "run", iters=5, **given)
    patch_run(tmp_path / "run", iters=8, **given)
    same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("given", [{"ema": 0.9}, {"ema": 0.9, "class_conditional": True, "hflip": True, "lr_schedule": "cosine"}])
def test_4_a_backbone_too(tmp_path, given):
    pretrain_run(tmp_path / "straight", iters=8, **given)
    settings = settings_for("pretrain", **SMALL | SHAPE | {"iters": 8, "data": "digits", "run": tmp_path / "run"} | given)
    with pytest.raises(Interrupted, match="saved at step 5"):
        pretrain.pretrain(settings, Cut(5))
    pretrain.pretrain(settings, Silent())
    same_run(tmp_path / "run", tmp_path / "straight")
    averaged, raw = (
        tensors_of(tmp_path / "run" / name) for name in ("backbone.safetensors", "checkpoints/step-0000008/trainer.safetensors")
    )
    assert not torch.equal(averaged["final_layer.linear.weight"], raw["raw.final_layer.linear.weight"])
    assert torch.equal(averaged["final_layer.linear.weight"], raw["ema.final_layer.linear.weight"])


def test_4_another_seed_is_another_patch(tmp_path, finished):
    patch_run(tmp_path / "run", seed=1, prompt_lr=0.05, gate_lr=0.05, ema=0.0)
    assert sha256_of(tmp_path / "run" / "patch.safetensors") != sha256_of(finished / "patch.safetensors")


def test_4_how_images_are_loaded_changes_nothing(tmp_path, finished):
    patch_run(tmp_path / "run", num_workers=2, prompt_lr=0.05, gate_lr=0.05, ema=0.0)
    same_run(tmp_path / "run", finished)


# 5


def test_5_a_saved_patch_has_the_keys_of_the_method(finished):
    about = json.loads((finished / "patch.json").read_text())
    fresh = build_patch(load_backbone(Base()).model, Dmp(**about["method"]))
    assert set(tensors_of(finished / "patch.safetensors")) == set(fresh.state_dict())
    assert set(load_patch(finished).patch.state_dict()) == set(fresh.state_dict())  # a tampered one: tests/unit/engine


# 6


def test_6_another_backbone_is_refused_by_what_differs(tmp_path, finished):
    """The same shape with other weights, another schedule, another size: each by its name."""
    depth = BUNDLED.depth
    same = {"hidden_size": BUNDLED.hidden_size, "depth": depth, "num_heads": BUNDLED.num_heads, "iters": 1}
    for name, more, sentence in (
        ("weights", {}, "another backbone: sha256 "),
        ("schedule", {"schedule": "cosine"}, "with schedule "),
        ("depth", {"depth": depth + 1}, f"with sites {depth}, this one has {depth + 1}"),
        ("channels", {"channels": 3}, "with latent shape "),
    ):
        pretrain_run(tmp_path / name, **same | more)
        with pytest.raises(IntegrityError, match=sentence):
            load_patch(finished, Base(base=str(tmp_path / name)))


# 9


def test_9_a_command_writes_into_its_run_and_nowhere_else(tmp_path, monkeypatch, cli, most_loss_images):
    """Home, cache, temporary folder and working directory are watched through every command."""
    for name, folder in (("HOME", "home"), ("XDG_CACHE_HOME", "home/cache"), ("TMPDIR", "tmp")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(name, str(tmp_path / folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    most_loss_images(20)
    few = ("--iters", 2, "--batch-size", 4, "--steps", 2, "--cpu")
    run = tmp_path / "runs" / "one"

    def elsewhere() -> dict[str, str]:
        ours = ("runs", "home/cache/dmpctl")
        return {name: digest for name, digest in tree(tmp_path).items() if not name.startswith(ours)}

    before = elsewhere()
    for line in (
        ("patch", "--run", run, "--eval-images", 70, *few),
        ("sample", run, "--num-images", 3, "--steps", 2, "--cpu"),
        ("sample", run, "--num-images", 3, "--steps", 2, "--cpu", "--format", "npz", "--unpatched"),
        ("fid", run, "--max-images", 70, "--steps", 2, "--cpu"),
        ("inspect-gates", run, "--timesteps", 4),
        (
            "pretrain",
            "--data",
            "digits",
            "--run",
            tmp_path / "runs" / "two",
            "--hidden-size",
            16,
            "--depth",
            1,
            "--num-heads",
            2,
            *few[:4],
        ),
        ("download",),
        ("doctor",),
    ):
        assert cli(*line).code == 0, line
        assert elsewhere() == before, line
    for line in (
        ("patch", "--dry-run", *few),
        ("pretrain", "--data", "digits", "--dry-run"),
        ("sample", run, "--dry-run"),
        ("fid", run, "--dry-run", "--max-images", 70),
        ("inspect-gates", run, "--dry-run"),
        ("download", "inception", "--dry-run"),
        ("patch", "--print-config"),
    ):
        whole = tree(tmp_path)
        assert cli(*line).code == 0, line
        assert tree(tmp_path) == whole, line


def test_9_a_run_stopped_at_any_write_ends_as_if_nothing_had_been(tmp_path, monkeypatch):
    """Stop before and after each file of a whole run; then the same command ends it, equal to the undisturbed one."""
    from dmpctl import files as written
    from dmpctl.runs import checkpoint as saving

    given = {"iters": 4, "save_every": 2}
    patch_run(tmp_path / "straight", **given)
    write, count = written.write_atomic, 0

    def counted(path, data):
        nonlocal count
        count += 1
        if count == stop and before:
            raise KeyboardInterrupt
        write(path, data)
        if count == stop:
            raise KeyboardInterrupt

    def put(target) -> None:
        for module in (written, saving):
            target.setattr(module, "write_atomic", counted)

    stop, before = 0, True
    with monkeypatch.context() as patched:
        put(patched)
        patch_run(tmp_path / "counted", **given)
    writes = count
    assert writes == 12  # config, provenance, two checkpoints of four files, and the patch with its description
    for stop in range(1, writes + 1):
        for before in (True, False):
            run, count = tmp_path / f"{stop}-{before}", 0
            with monkeypatch.context() as patched:
                put(patched)
                with pytest.raises(KeyboardInterrupt):
                    patch_run(run, **given)
            patch_run(run, **given)
            same_run(run, tmp_path / "straight")
            assert files(run) == files(tmp_path / "straight")
