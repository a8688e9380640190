"""Reads a DiT's config from files of others, once for `--base` and `import`: each key is used, harmless, or refused by name.

The keys are those of the training scripts of DiT, SiT, REPA and DMP; another key is listed, and refused where its name speaks of
what a network computes. What neither the file nor an option says is assumed, and listed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dmpctl.backbones.dit import DiTConfig, shape_config
from dmpctl.errors import IntegrityError, UsageError
from dmpctl.foreign.said import Scalar, value_in
from dmpctl.store.shapes import SHAPES, is_flow
from dmpctl.types import ScheduleKind, ScheduleSpec

HEADS = {width: heads for width, _, heads in SHAPES.values()}
PROJECTORS = "projectors."  # of REPA (Yu et al. 2025, arXiv 2410.06940), for its training alone
BETAS: Mapping[str, ScheduleKind] = {  # names of noise schedules elsewhere
    "linear": "linear",
    "cosine": "cosine",
    "squaredcos_cap_v2": "cosine",
    "scaled_linear": "scaled-linear",
    "scaled-linear": "scaled-linear",
    "flow": "flow",
}
ENDS = {"linear": (1e-4, 0.02), "scaled-linear": (0.00085, 0.012)}  # first and last beta
SCHEDULES = ("schedule_name", "noise_schedule", "beta_schedule", "noise_scheduler", "diffusion.schedule")
STEPS = ("diffusion_steps", "num_train_timesteps", "num_diffusion_steps", "num_timesteps")
PREDICTIONS = ("prediction", "prediction_type", "model_mean_type", "parameterization")
OF_REPA = ("enc_type", "proj_coeff", "encoder_depth")
FIXED: Mapping[str, tuple[Scalar, ...]] = {  # what has to have this value, as the network computes it in no other way
    **dict.fromkeys(("predict_xstart", "qk_norm", "use_qknorm", "use_rope", "use_rmsnorm", "use_swiglu", "wo_shift"), (False,)),
    **dict.fromkeys(("rescale_timesteps", "rescale_betas_zero_snr", "sigma_small"), (False,)),
    **dict.fromkeys(("shift", "time_shift", "timestep_shift", "time_dist_shift"), (0, 1)),
    "mlp_ratio": (4,),
    "trained_betas": ("",),
}
USED = (
    *("model", "name", "model_name", "num_heads", "num_attention_heads", "num_classes", "class_dropout_prob", "cfg_prob"),
    *("learn_sigma", "patch_size", "hidden_size", "depth", "in_channels", "input_size", "latent_size", "beta_start", "beta_end"),
    *("uncond", "vae", "path_type", "from_data", *SCHEDULES, *STEPS, *PREDICTIONS, *OF_REPA, *FIXED),
    *("topk", "type", "vp_type", "position", "pt_depth"),  # of a DMP patch: exchange.importer, or its tensors
)
# Words of what a network computes, but where they speak of its training; and names of how it was trained, and where it lay.
TELLING = re.compile(
    r"rope|norm|shift|predict|parameteri|path_type|flow|schedule|beta|sigma|swiglu|rescale|register|window|qk|embed|timestep"
)
TRAINING = re.compile(r"grad|lr_|learning_rate|adam|optim|warmup|clip|^scheduler$|^betas?_?[12]?$")
HARMLESS = re.compile(
    r"(.*_)?(lr|eps|epsilon|decay|seed|size|batch|steps?|every|epochs?|iters?|dir|path|root|file|folder|ckpt|checkpoint|checkpointing"
    r"|resume|workers?|precision|tf32|log|logs|wandb|project|exp|run|results?|output|data|dataset|image|resolution|device|gpus?|rank"
    r"|world|port|dist|amp|ema|optim|optimizer|warmup|loss|weighting|scale|samples?|prompts?|tokens?|gate|balance|load|weight|train"
    r"|eval|fid|note|date|version|tag|host|user|report|attn|lr_schedule|norm|beta[12]|betas|rate)"
    r"(_(type|name|id|dir|path|size|steps?|every|weight|eps|to|method|fn|mode|only|decay|adam|depth|coeff|scale|interval|freq))?"
)


@dataclass(frozen=True)
class Given:
    """Answers that options give: a published shape, attention heads, a noise schedule; None: no answer."""

    shape: str | None = None
    heads: int | None = None
    schedule: ScheduleKind | None = None


@dataclass(frozen=True)
class Told:
    """A DiT and its schedule, its own tensors, the codec's name where the file has one, and what was assumed, in sentences."""

    config: DiTConfig
    schedule: ScheduleSpec
    tensors: dict[str, Tensor]
    codec: str | None
    assumed: tuple[str, ...]


def told(what: object, tensors: Mapping[str, Tensor], said: Mapping[str, Scalar], given: Given) -> Told:
    """The model that a file describes, which errors call `what`.

    IntegrityError where tensors and words contradict each other, or there is no DiT; UsageError for a model that is not computed
    here, and where nothing says how many heads it has.
    """
    assumed = _unknown(what, said)
    own = {name: value for name, value in tensors.items() if not name.startswith(PROJECTORS)}
    if len(own) < len(tensors):
        assumed.append(f"{len(tensors) - len(own)} tensors of REPA's projectors were left out: they serve its training alone")
    says = _text(said, "models.name", "model.name", "model_name", "model")
    named = next((name for name in (given.shape, says) if name and shape_config(name)), None)
    config = infer_config(own, given.heads or _heads(what, own, said, given, named, assumed))
    _refuse_other_sizes(what, config, said)
    config = _with_classes(what, config, said, assumed)
    repa = len(own) < len(tensors) or any(value_in(said, name) is not None for name in OF_REPA)
    schedule, config = _schedule(what, config, said, given, named, repa, assumed)
    vae = _text(said, "vae")
    codec = f"vae-{vae}" if vae in ("ema", "mse") and config.channels == 4 else None
    return Told(config, schedule, own, codec, tuple(assumed))


def _text(said: Mapping[str, Scalar], *names: str) -> str | None:
    found = value_in(said, *names)
    return found if isinstance(found, str) else None


def _number(said: Mapping[str, Scalar], *names: str) -> int | None:
    found = value_in(said, *names)
    return found if type(found) is int and found >= 0 else None


def _unknown(what: object, said: Mapping[str, Scalar]) -> list[str]:
    """The sentence on keys that say nothing known; UsageError for one that would change what the network computes."""
    unknown = []
    for path, value in said.items():
        key = path.rpartition(".")[2].replace("-", "_").lower()
        if key in FIXED and value not in FIXED[key] and value not in ("none", "None"):
            raise UsageError(f"{what} says {path} = {value}, and such a model is not computed here", "name another checkpoint")
        if key in USED or value in (False, "", "none", "None"):
            continue
        if TELLING.search(key) and not TRAINING.search(key):
            hint = "if it changes nothing, save the state dict alone and name that file"
            raise UsageError(f"{what} says {path} = {value}, and it is not known what that means", hint)
        if not HARMLESS.fullmatch(key):
            unknown.append(path)
    return [f"its config says {', '.join(unknown)}, which was not used"] if unknown else []


def _heads(
    what: object, own: Mapping[str, Tensor], said: Mapping[str, Scalar], given: Given, named: str | None, assumed: list[str]
) -> int | None:
    """Attention heads, which no tensor shows: as said, else of a named shape of this width, else (None) to be guessed by it."""
    kernel = own.get("x_embedder.proj.weight")
    width = kernel.shape[0] if kernel is not None and kernel.ndim else 0
    shape = shape_config(named) if named else None
    by_name = shape.num_heads if shape is not None and shape.hidden_size == width else None
    number = _number(said, "num_heads", "num_attention_heads") or None
    if given.shape and number is not None and by_name not in (None, number):
        raise UsageError(f"{what} says that it has {number} heads, {given.shape} has {by_name}", "name the file alone")
    if number is None and by_name is None and width in HEADS:
        assumed.append(f"{HEADS[width]} heads were assumed, as the published shape of this width has them (--num-heads)")
    return number or by_name


def _refuse_other_sizes(what: object, config: DiTConfig, said: Mapping[str, Scalar]) -> None:
    """IntegrityError where the words contradict the tensors; of nothing but the network's own sizes."""
    sizes = {"patch_size": config.patch_size, "hidden_size": config.hidden_size, "in_channels": config.channels}
    sizes |= {"depth": config.depth, "input_size": config.input_size, "latent_size": config.input_size}
    for key, size in sizes.items():
        if (number := _number(said, key)) not in (None, size):
            raise IntegrityError(f"{what} says {key} = {number}, its tensors {size}", "name the checkpoint that its config is of")
    sigma = value_in(said, "learn_sigma")
    if isinstance(sigma, bool) and sigma != config.learned_sigma:
        raise IntegrityError(f"{what} says learn_sigma = {sigma}, its tensors have {config.out_channels} outputs")


def _with_classes(what: object, config: DiTConfig, said: Mapping[str, Scalar], assumed: list[str]) -> DiTConfig:
    """The rows of the label table as classes, and whether the last one is the null class."""
    rows = config.label_rows
    count, dropped = _number(said, "num_classes"), value_in(said, "class_dropout_prob", "cfg_prob")
    if rows == 1:
        return config
    if value_in(said, "uncond") is True:
        raise IntegrityError(f"{what} says that it is unconditional, its table has {rows} rows")
    null = count == rows - 1 if count else dropped != 0
    if (count and rows - count not in (0, 1)) or (isinstance(dropped, float | int) and (dropped > 0) != null):
        words = f"{count} classes" if count else "classes"
        words += "" if dropped is None else f", dropped with probability {dropped:g}" if isinstance(dropped, float | int) else ""
        raise IntegrityError(f"{what} says {words}, its table has {rows} rows")
    if count is None and dropped is None:
        assumed.append(f"{rows - 1} classes and a null class were assumed: its table has {rows} rows")
    return replace(config, num_classes=rows - null, null_class=null)


def _schedule(
    what: object,
    config: DiTConfig,
    said: Mapping[str, Scalar],
    given: Given,
    named: str | None,
    repa: bool,
    assumed: list[str],
) -> tuple[ScheduleSpec, DiTConfig]:
    """The schedule, and the config with the direction in which its network counts time."""
    path, prediction = (_text(said, *names) for names in (("path_type",), PREDICTIONS))
    word = next((found for name in SCHEDULES if (found := _text(said, name)) is not None), None)
    flows = is_flow(named or "") or repa or path is not None or (prediction or "").lower() in ("velocity", "v")
    kind = given.schedule or ("flow" if flows else None)
    if kind is None and word is not None:
        if word.lower() not in BETAS:
            raise UsageError(f"{what} says that its noise schedule is {word}, which is not known", "name another checkpoint")
        kind = BETAS[word.lower()]
    accepted = ("velocity", "v") if kind == "flow" else ("epsilon", "eps", "noise")
    wrong = [("path", path, ("linear",))] if kind == "flow" else []
    for key, found, good in (*wrong, ("prediction", prediction, accepted)):
        if found is not None and found.lower() not in good:
            raise UsageError(
                f"{what} says {key} {found}; of such a model only {' or '.join(good)} is computed here", "name another checkpoint"
            )
    if kind is None:
        assumed.append("a linear schedule was assumed: the file names none (--schedule)")
    elif kind == "flow" and not flows and value_in(said, "from_data") is None:
        assumed.append("time was assumed to run from noise (0) to images (1), as in SiT")
    kind = kind or "linear"
    if kind == "flow":
        return ScheduleSpec(kind), replace(config, from_data=repa or value_in(said, "from_data") is True)
    ends = tuple(value_in(said, name) for name in ("beta_start", "beta_end"))
    if None not in ends and ends != ENDS.get(kind, ends):
        raise UsageError(f"{what} says that its betas run from {ends[0]} to {ends[1]}, which is not known", "name another one")
    return ScheduleSpec(kind, _number(said, *STEPS) or 1000), config


def infer_config(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> DiTConfig:
    """The shape of a state dict in the published layout, its label table with a null class where it has rows for one.

    `num_heads` None: as in the published model of that width. IntegrityError if this is no DiT;
    UsageError if the heads cannot be known.
    """
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        tokens = tensors["pos_embed"].shape[1]
        rows = tensors["y_embedder.embedding_table.weight"].shape[0]
        outputs = tensors["final_layer.linear.bias"].shape[0]
    except KeyError as error:
        raise IntegrityError(f"this is no DiT in the published layout: it lacks {error}") from None
    except (ValueError, IndexError):
        raise IntegrityError("this is no DiT in the published layout: its tensors have other dimensions") from None
    blocks = [re.match(r"blocks\.(\d{1,4})\.", name) for name in tensors]
    depth = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    if not depth:
        raise IntegrityError("this is no DiT in the published layout: it lacks 'blocks.0'")
    heads = num_heads or HEADS.get(width)
    if heads is None:
        raise UsageError(
            f"a DiT of width {width} is no published shape, so its number of heads is unknown",
            "name a shape: --base DiT-S/2 --weights FILE, or say how many: dmpctl import FILE --num-heads N",
        )
    side = int(tokens**0.5) * patch
    return DiTConfig(
        side, channels, patch, width, depth, heads, 0 if rows == 1 else rows - 1, True, outputs == 2 * channels * patch * patch
    )
