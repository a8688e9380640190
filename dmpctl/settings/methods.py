"""What can be trained on a frozen backbone, one section per method; they share the settings' one field `method`."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from dmpctl.settings.sections import Section


class PromptMethod(Section, panel="Method"):
    """What DMP and prompt tuning share: where prompts are, how many, and how they start."""

    prompts: Annotated[int | None, Field(ge=1, description="Prompts per block; default: as many as tokens.")] = None
    position: Annotated[Literal["add", "prepend"], Field(description="Add prompts to the tokens, or prepend them.")] = "add"
    prompt_depth: Annotated[int | None, Field(ge=1, description="Patch only the first blocks; default: all.")] = None
    prompt_sites: Annotated[
        str | None,
        Field(pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$", description="Patch only these blocks, such as 0,2,4-7; default: all."),
    ] = None
    sites: Annotated[
        Literal["all", "down", "mid", "up"], Field(description="Part of a U-Net whose transformer blocks are patched.")
    ] = "all"
    prompt_init: Annotated[
        Literal["zero", "random"], Field(description="Prompts at the start: zero (the backbone itself), or random, sd 0.02.")
    ] = "zero"
    prompt_lr: Annotated[float, Field(gt=0, description="Learning rate of the prompts.")] = 1e-4

    @model_validator(mode="after")
    def _sites_once(self) -> Self:
        if self.prompt_depth is not None and self.prompt_sites is not None:
            raise ValueError("prompt_depth and prompt_sites both say which blocks are patched, give one of the two")
        if self.sites != "all" and (self.prompt_depth, self.prompt_sites) != (None, None):
            raise ValueError(f"sites {self.sites} says which blocks are patched, leave prompt_depth and prompt_sites out")
        return self


class Dmp(PromptMethod):
    """The method of the paper: gated prompts added to (or prepended before) the tokens of every block."""

    method: Annotated[Literal["dmp"], Field(description="What is trained.")] = "dmp"
    prompt_sets: Annotated[
        int | None,
        Field(ge=2, description="Mix this many whole sets of prompts per block, not single prompts (extension); default: none."),
    ] = None
    prompt_rank: Annotated[int | None, Field(ge=1, description="Rank of the prompts as a matrix (extension); default: full.")] = (
        None
    )
    gate: Annotated[
        Literal["soft", "topk", "hard", "uniform", "random"],
        Field(description="Mix all prompts, the k best, the best alone, all alike, or by a random gate that is not trained."),
    ] = "soft"
    topk: Annotated[int | None, Field(ge=1, description="Prompts that --gate topk keeps; default: none with --gate soft.")] = None
    gate_input: Annotated[
        Literal["t", "t+y"] | None, Field(description="What the gate sees; default: t+y with --position add, else t.")
    ] = None
    gate_per_site: Annotated[bool, Field(description="A gate of its own for every block (extension).")] = False
    gate_scale: Annotated[float | None, Field(gt=0, description="Factor on the gate weights; default: 1 (published).")] = None
    gate_noise: Annotated[bool, Field(description="Learned gate noise in training (Shazeer et al. 2017).")] = True
    balance: Annotated[
        Literal["shazeer", "per-sample", "none"], Field(description="Balance loss; per-sample is the published code's.")
    ] = "shazeer"
    importance_weight: Annotated[float, Field(ge=0, description="Weight of the importance loss.")] = 0.01
    load_weight: Annotated[float, Field(ge=0, description="Weight of the load loss (topk and hard).")] = 0.01
    gate_lr: Annotated[float, Field(gt=0, description="Learning rate of gate and gate noise.")] = 1e-3

    @model_validator(mode="after")
    def _gate_fits(self) -> Self:
        if self.gate == "topk" and self.topk is None:
            raise ValueError("gate topk needs topk, the number of prompts that it keeps")
        if self.gate != "topk" and self.topk is not None:
            raise ValueError(f"topk {self.topk} needs gate topk, found gate {self.gate}")
        mixed = "prompts" if self.prompt_sets is None else "prompt_sets"
        count = getattr(self, mixed)
        if self.topk is not None and count is not None and self.topk > count:
            raise ValueError(f"topk {self.topk} is more than {mixed} {count}")
        if self.gate_per_site and self.gate in ("uniform", "random"):
            raise ValueError(f"gate_per_site needs a gate that is trained, found gate {self.gate}")
        return self


class PromptTuning(PromptMethod):
    """The same prompts without a gate (Jia et al. 2022, as the paper compares with)."""

    method: Annotated[Literal["prompt"], Field(description="What is trained.")] = "prompt"


class Lora(Section, panel="Method"):
    """Low-rank changes of linear layers (Hu et al. 2022), through peft."""

    method: Annotated[Literal["lora"], Field(description="What is trained.")] = "lora"
    rank: Annotated[int, Field(ge=1, description="LoRA: rank.")] = 8
    alpha: Annotated[float | None, Field(gt=0, description="LoRA: scale is alpha / rank; default: alpha = rank.")] = None
    targets: Annotated[
        str,
        Field(pattern=r"^(qkv|proj|mlp)(,(qkv|proj|mlp))*$", description="LoRA: which linear layers, of qkv, proj and mlp."),
    ] = "qkv,proj"
    lr: Annotated[float, Field(gt=0, description="Learning rate of LoRA or full fine-tuning.")] = 1e-4


class Full(Section, panel="Method"):
    """All weights of the backbone (full fine-tuning)."""

    method: Annotated[Literal["full"], Field(description="What is trained.")] = "full"
    lr: Annotated[float, Field(gt=0, description="Learning rate of LoRA or full fine-tuning.")] = 1e-4


# What `method` can be. One more kind: its class above, its name here, a case in models.build and a row in the contract suite.
Method = Dmp | PromptTuning | Lora | Full
METHODS: dict[str, type[Section]] = {kind.model_fields["method"].default: kind for kind in get_args(Method)}
