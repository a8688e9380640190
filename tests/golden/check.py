"""Golden pairs, made with the published code, against this package: every tensor that can be recomputed is.

NAME.weights.safetensors is a state dict of backbone and patch with their shape in its metadata; NAME.tensors.safetensors
holds inputs and what the published code made of them. Shapes: B batch, C/H/W channels, height, width, L blocks, N prompts.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmpctl.backbones.dit import DiT, DiTConfig
from dmpctl.backbones.dit_weights import Weights, dit_from
from dmpctl.diffusion.guidance import guide
from dmpctl.diffusion.objective import HybridObjective, Losses
from dmpctl.diffusion.samplers import sample
from dmpctl.diffusion.schedule import NoiseSchedule, respaced_timesteps
from dmpctl.errors import DmpError, IntegrityError
from dmpctl.files import read_json, read_tensors
from dmpctl.methods.dmp import DmpPatch, dmp_shape
from dmpctl.methods.gate import per_sample_importance
from dmpctl.models.patched import predict_patched
from dmpctl.settings.methods import Dmp
from dmpctl.settings.training import Objective
from dmpctl.types import ScheduleSpec

WEIGHTS, TENSORS, RESPACED = ".weights.safetensors", ".tensors.safetensors", "respaced_timesteps.json"
PATCH_KEYS = ("prompt_embeddings", "gate.weight", "gate.bias", "w_noise")
INPUTS = ("x", "t", "y", "noise", "cfg_y", "cfg_scale", "sample.y", "sample.z", "sample.noises")
PER_SCHEDULE = ("betas", "x_t", "mse", "vb", "mse_min_snr_5", "importance")
OUTPUTS = (
    *("base_out", "dmp_out", "gates", "cfg_out"),
    *(f"{kind}.{what}" for kind in ("linear", "cosine") for what in PER_SCHEDULE),
    *("sample.timesteps", "sample.ddpm10", "sample.ddim10"),
)
STEPS = 1000  # of a schedule whose betas are not in the file


@dataclass(frozen=True)
class Scale:
    """How an error is measured, and how large it may be."""

    unit: str
    tolerance: float

    def worst(self, found: Tensor, expected: Tensor) -> float:
        """The largest error of `found`; NaN where either is not finite."""
        error = (found.double() - expected.double()).abs()
        match self.unit:
            case "relative":
                error = torch.where(error == 0, error, error / expected.double().abs())
            case "of its standard deviation":
                error = error / expected.double().std()
        return float(error.max())


FORWARD, LOSS, SAMPLED = Scale("absolute", 1e-5), Scale("relative", 1e-5), Scale("of its standard deviation", 1e-4)
BETAS, EXACT = Scale("relative", 1e-6), Scale("absolute", 0.0)


@dataclass(frozen=True)
class Finding:
    """The worst error of one tensor; `trouble` says why there is no error, None where there is one."""

    name: str
    scale: Scale
    worst: float = math.nan
    trouble: str | None = None

    @property
    def good(self) -> bool:
        return self.worst <= self.scale.tolerance  # NaN is not

    def __str__(self) -> str:
        error = self.trouble or f"{self.worst:.2e} {self.scale.unit}, tolerance {self.scale.tolerance:g}"
        return f"  {'ok  ' if self.good else 'FAIL'} {self.name:22} {error}"


def compare(name: str, scale: Scale, found: Tensor, expected: Tensor) -> Finding:
    """The finding for a tensor that was recomputed."""
    if found.shape != expected.shape:
        return Finding(name, scale, trouble=f"shape {list(found.shape)}, expected {list(expected.shape)}")
    if not expected.numel():
        return Finding(name, scale, trouble="it is empty")
    return Finding(name, scale, scale.worst(found, expected))


class Absent(Exception):
    """A tensor cannot be recomputed, as one of its inputs is not in the file."""


class Replay:
    """A Draw that returns the recorded noise [B, C, H, W] in the order in which it was drawn."""

    def __init__(self, z: Tensor, noises: Tensor) -> None:
        self._left: Iterator[Tensor] = iter([z, *noises])

    def __call__(self) -> Tensor:
        for noise in self._left:
            return noise
        raise IntegrityError("more noise is drawn than sample.noises holds")


def config_of(about: Mapping[str, Any], state: Mapping[str, Tensor]) -> DiTConfig:
    """The backbone's shape; what the metadata leaves open (channels, variance, null class) comes from the weights."""
    channels = state["x_embedder.proj.weight"].shape[1]
    classes = 0 if about["uncond"] else about["num_classes"]
    patch, outputs = about["patch_size"], state["final_layer.linear.bias"].shape[0]
    return DiTConfig(
        input_size=about["input_size"],
        channels=channels,
        patch_size=patch,
        hidden_size=about["hidden_size"],
        depth=about["depth"],
        num_heads=about["num_heads"],
        num_classes=classes,
        null_class=state["y_embedder.embedding_table.weight"].shape[0] > classes,
        learned_sigma=outputs == 2 * channels * patch**2,
    )


def kept_of(fraction: float, prompts: int, gates: Tensor | None) -> int:
    """k of the top-k gate. Where fraction * N is no whole number, the golden gates [L, B, N] say which way it was rounded."""
    exact = fraction * prompts
    if abs(exact - round(exact)) > 1e-6 and gates is not None:
        up = bool((gates > 0).sum(-1).max() > math.floor(exact))
        return math.ceil(exact) if up else max(1, math.floor(exact))
    return max(1, math.floor(exact + 1e-6))


def build(state: Mapping[str, Tensor], about: Mapping[str, Any], gates: Tensor | None) -> tuple[DiT, DmpPatch]:
    """Backbone and patch with the golden weights, frozen; IntegrityError unless each key fits."""
    weights = {name: value for name, value in state.items() if name not in PATCH_KEYS}
    backbone = dit_from(Weights(weights, "the file", config_of(about, state))).eval().requires_grad_(False)
    prompts = about["num_prompts"]
    kept = kept_of(about["topk"], prompts, gates)
    common = {"prompts": prompts, "prompt_depth": about["prompt_depth"]}
    settings = Dmp(**common) if kept == prompts else Dmp(**common, gate="topk", topk=kept)
    patch = DmpPatch(dmp_shape(backbone.spec, settings), settings).eval().requires_grad_(False)
    try:
        patch.load_state_dict({name: state[name] for name in PATCH_KEYS if name in state})
    except RuntimeError as error:
        raise IntegrityError(f"the patch does not fit its config: {' '.join(str(error).split())}") from None
    return backbone, patch


class Golden:
    """One pair: its models, its tensors, and the recomputation of each."""

    def __init__(self, directory: Path, name: str) -> None:
        """IntegrityError where a file cannot be read or its weights do not fit its config."""
        state, metadata = read_tensors(directory / (name + WEIGHTS))
        self.tensors, _ = read_tensors(directory / (name + TENSORS))
        try:
            self.backbone, self.patch = build(state, json.loads(metadata["config"]), self.tensors.get("gates"))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise IntegrityError(f"its config cannot be used ({type(error).__name__}: {error})") from None

    def _input(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise Absent(name)
        return self.tensors[name]

    def _labels(self, name: str) -> Tensor | None:
        """Labels [B] of a class-conditional model; None for an unconditional one, whatever the file holds."""
        return self._input(name) if self.backbone.config.num_classes else None

    def _predict(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """The patched model's prediction, by the very function that trains and samples."""
        return predict_patched(self.backbone, self.patch.time_only, self.patch, x, t, cond)[0]

    @cached_property
    def _gates(self) -> Tensor:
        return self.patch.route(self.backbone.embed(self._input("t"), self._labels("y"))).gates

    def _schedule(self, kind: str) -> NoiseSchedule:
        betas = self.tensors.get(f"{kind}.betas")
        return NoiseSchedule.from_spec(ScheduleSpec(kind, STEPS if betas is None else len(betas)))  # type: ignore[arg-type]

    def _x_t(self, kind: str) -> Tensor:
        return self._schedule(kind).add_noise(self._input("x"), self._input("t"), self._input("noise"))

    def _losses(self, kind: str, settings: Objective) -> Losses:
        """Losses of the patched model; without the bound, `loss` is the weighted MSE."""
        x, t, noise, x_t = self._input("x"), self._input("t"), self._input("noise"), self._x_t(kind)
        objective = HybridObjective(self._schedule(kind), self.backbone.config.learned_sigma, settings)
        return objective(self._predict(x_t, t, self._labels("y")), x, x_t, t, noise)

    def _bound(self, kind: str) -> Tensor:
        vb = self._losses(kind, Objective()).vb
        if vb is None:
            raise IntegrityError("this model learns no variance")
        return vb

    def _weighted(self, kind: str, gamma: float) -> Tensor:
        settings = Objective(loss_weight="min-snr", min_snr_gamma=gamma)
        weight = HybridObjective(self._schedule(kind), True, settings).weight(self._input("t"))
        return weight * self._losses(kind, settings).mse

    def _guided(self) -> Tensor:
        null, scale = self.backbone.spec.null_class, float(self._input("cfg_scale"))
        nothing = None if null is None else torch.tensor([null])
        return guide(self._predict, self._labels("cfg_y"), nothing, scale, "3")(self._input("x"), self._input("t"))

    def _timesteps(self, expected: Tensor) -> Tensor:
        """Kept timesteps, in the direction of `expected`."""
        kept = torch.tensor(respaced_timesteps(len(self._schedule("linear")), len(expected)))
        return kept.flip(0) if len(expected) > 1 and expected[0] > expected[-1] else kept

    def _sampled(self, sampler: str, steps: int) -> Tensor:
        """x0 of the patched model on the linear schedule, without guidance."""
        z, cond = self._input("sample.z"), self._labels("sample.y")
        draw = Replay(z, self._input("sample.noises") if sampler == "ddpm" else z[:0])
        learned, schedule = self.backbone.config.learned_sigma, self._schedule("linear")
        return sample(lambda x, t: self._predict(x, t, cond), draw, schedule, learned, sampler, steps)  # type: ignore[arg-type]

    def way(self, name: str) -> tuple[Scale, Callable[[], Tensor]] | None:
        """How tensor `name` is compared and recomputed; None for an input, and for what is not known here."""
        match name.split("."):
            case ["base_out"]:
                return FORWARD, lambda: self.backbone.denoise(self._input("x"), self._input("t"), self._labels("y"))
            case ["dmp_out"]:
                return FORWARD, lambda: self._predict(self._input("x"), self._input("t"), self._labels("y"))
            case ["gates"]:
                return FORWARD, lambda: self._gates
            case ["cfg_out"]:
                return FORWARD, self._guided
            case ["linear" | "cosine" as kind, "betas"]:
                return BETAS, lambda: self._schedule(kind).betas
            case ["linear" | "cosine" as kind, "x_t"]:
                return FORWARD, lambda: self._x_t(kind)
            case ["linear" | "cosine", "importance"]:
                return LOSS, lambda: per_sample_importance(self._gates)
            case ["linear" | "cosine" as kind, "mse"]:
                return LOSS, lambda: self._losses(kind, Objective()).mse
            case ["linear" | "cosine" as kind, "vb"]:
                return LOSS, lambda: self._bound(kind)
            case ["linear" | "cosine" as kind, what] if gamma := re.fullmatch(r"mse_min_snr_(\d+)", what):
                return LOSS, lambda: self._weighted(kind, float(gamma[1]))
            case ["sample", "timesteps"]:
                return EXACT, lambda: self._timesteps(self._input(name))
            case ["sample", what] if run := re.fullmatch(r"(ddpm|ddim)(\d+)", what):
                return SAMPLED, lambda: self._sampled(run[1], int(run[2]))
        return None

    @torch.inference_mode()
    def findings(self) -> Iterator[Finding | str]:
        """A finding for each tensor that was recomputed; a sentence for each that was skipped."""
        expected = [name for name in OUTPUTS if name != "cfg_out" or self.backbone.config.num_classes]
        for name in dict.fromkeys([*expected, *sorted(self.tensors)]):
            way = self.way(name)
            if name not in self.tensors:
                yield f"  skip {name:22} it is not in the file"
            elif way is None:
                if name not in INPUTS:
                    yield f"  skip {name:22} nothing here recomputes it"
            else:
                yield self._finding(name, *way)

    def _finding(self, name: str, scale: Scale, compute: Callable[[], Tensor]) -> Finding | str:
        try:
            return compare(name, scale, compute(), self.tensors[name])
        except Absent as error:
            return f"  skip {name:22} its input {error} is not in the file"
        except (DmpError, RuntimeError, IndexError, ValueError) as error:
            return Finding(name, scale, trouble=f"it cannot be recomputed ({str(error).partition(chr(10))[0]})")


def check_pair(directory: Path, name: str) -> tuple[list[str], bool]:
    """Lines on one pair, and whether all of what could be recomputed agrees; it does not where that is nothing."""
    missing = [suffix for suffix in (WEIGHTS, TENSORS) if not (directory / (name + suffix)).is_file()]
    if missing:
        return [name, f"  FAIL {name}{missing[0]} is missing"], False
    try:
        found = list(Golden(directory, name).findings())
    except DmpError as error:
        return [name, f"  FAIL {error}"], False
    checked = [finding for finding in found if isinstance(finding, Finding)]
    if not checked:
        return [name, *map(str, found), "  FAIL it holds no tensor that can be checked"], False
    return [name, *map(str, found)], all(finding.good for finding in checked)


def check_respaced(path: Path) -> tuple[list[str], bool]:
    """Lines on the kept timesteps {count: [timestep, ...]} of the published 1000-step schedule, and whether all agree."""
    try:
        wanted = read_json(path)
        wrong = [count for count, kept in wanted.items() if kept != respaced_timesteps(STEPS, int(count))]
    except (DmpError, ValueError) as error:
        return [RESPACED, f"  FAIL {error}"], False
    verdicts = [f"  {'FAIL' if count in wrong else 'ok  '} {count + ' steps':22} exact" for count in wanted]
    return [RESPACED, *(verdicts or ["  FAIL it is empty"])], bool(wanted) and not wrong


def pairs_in(directory: Path) -> tuple[list[str], list[str]]:
    """Names of the pairs, and of weights or tensors without the other half."""
    weights, tensors = ({p.name.removesuffix(s) for p in directory.glob(f"*{s}")} for s in (WEIGHTS, TENSORS))
    return sorted(weights & tensors), sorted(weights ^ tensors)


def check_directory(directory: Path) -> tuple[list[str], int]:
    """What to print on all pairs in `directory`, and the exit code: 0 all agree, 1 something does not, 3 no pair."""
    if not directory.is_dir():
        return [f"there is no directory {directory}"], 3
    pairs, halves = pairs_in(directory)
    if not pairs:
        return [f"{directory} holds no pair NAME{WEIGHTS}, NAME{TENSORS}"], 3
    results = [check_pair(directory, name) for name in (*pairs, *halves)]
    if (directory / RESPACED).exists():
        results.append(check_respaced(directory / RESPACED))
    failed = sum(not good for _, good in results)
    verdict = f"{failed} of {len(results)} parts do not agree" if failed else f"{len(results)} parts agree"
    return [*(line for lines, _ in results for line in lines), verdict], int(failed > 0)
