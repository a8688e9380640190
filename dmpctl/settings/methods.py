"""Methods that are trained on a frozen backbone, one section each; they share the settings' one field `method`."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from dmpctl.refusals import Among, Clash, Takes
from dmpctl.settings.sections import Section


class PromptMethod(Section, panel="Method"):
    """Options that DMP and prompt tuning share: where prompts are, how many, and how they start."""

    prompts: int | None = Field(default=None, ge=1, description="Prompts per block; default: as many as tokens.")
    position: Literal["add", "prepend"] = Field(default="add", description="Add prompts to the tokens, or prepend them.")
    prompt_depth: int | None = Field(default=None, ge=1, description="Patch only the first blocks; default: all.")
    prompt_sites: Annotated[str | None, Takes("numbers of blocks and ranges of them, such as 0,2,4-7", "0,2,4-7")] = Field(
        default=None, pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$", description="Patch only these blocks, such as 0,2,4-7; default: all."
    )
    sites: Literal["all", "down", "mid", "up"] = Field(
        default="all", description="Part of a U-Net whose transformer blocks are patched."
    )
    prompt_init: Literal["zero", "random"] = Field(
        default="zero", description="Prompts at the start: zero (the backbone itself), or random, sd 0.02."
    )
    prompt_lr: float = Field(default=1e-4, gt=0, description="Learning rate of the prompts.")

    @model_validator(mode="after")
    def _sites_once(self) -> Self:
        if self.prompt_depth is not None and self.prompt_sites is not None:
            raise Clash(
                self,
                "{prompt_depth} and {prompt_sites} both say which blocks are patched",
                "leave {prompt_depth:-} or {prompt_sites:-} out",
            )
        other = "prompt_depth" if self.prompt_depth is not None else "prompt_sites"
        if self.sites != "all" and getattr(self, other) is not None:
            sentence = f"{{sites}} and {{{other}}} both say which blocks are patched"
            raise Clash(self, sentence, f"leave {{{other}:-}} or {{sites:-}} out")
        return self


class Dmp(PromptMethod):
    """The method of the paper: gated prompts added to (or prepended before) the tokens of every block."""

    method: Literal["dmp"] = Field(default="dmp", description="What is trained.")
    prompt_sets: int | None = Field(
        default=None,
        ge=2,
        description="Mix this many whole sets of prompts per block instead of single prompts (extension); default: none.",
    )
    prompt_rank: int | None = Field(default=None, ge=1, description="Rank of the prompts as a matrix (extension); default: full.")
    gate: Literal["soft", "topk", "hard", "uniform", "random"] = Field(
        default="soft",
        description="Prompts mixed: all (soft), the k best, the best (hard), all equally (uniform), or by an untrained gate.",
    )
    topk: int | None = Field(default=None, ge=1, description="Prompts that --gate topk keeps; default: none with --gate soft.")
    gate_input: Literal["t", "t+y"] | None = Field(
        default=None, description="What the gate sees; default: t+y with --position add, else t."
    )
    gate_per_site: bool = Field(default=False, description="Train a separate gate for each block (extension).")
    gate_scale: float | None = Field(default=None, gt=0, description="Factor on the gate weights; default: 1 (published).")
    gate_noise: bool = Field(default=True, description="Learned gate noise in training (Shazeer et al. 2017).")
    balance: Literal["shazeer", "per-sample", "none"] = Field(
        default="shazeer", description="Balance loss; per-sample is the published code's."
    )
    importance_weight: float = Field(default=0.01, ge=0, description="Weight of the importance loss.")
    load_weight: float = Field(default=0.01, ge=0, description="Weight of the load loss (topk and hard).")
    gate_lr: float = Field(default=1e-3, gt=0, description="Learning rate of gate and gate noise.")

    @model_validator(mode="after")
    def _gate_fits(self) -> Self:
        mixed = "prompts" if self.prompt_sets is None else "prompt_sets"
        count = getattr(self, mixed)
        if self.gate == "topk" and self.topk is None:
            few = min(8, count or 8)
            raise Clash(self, "{gate} needs {topk:-}, the number of prompts that it keeps", f"add {{topk:{few}}}")
        if self.gate != "topk" and self.topk is not None:
            raise Clash(self, "{topk} needs {gate:topk}, found {gate}", "say {gate:topk}, or leave {topk:-} out")
        if self.topk is not None and count is not None and self.topk > count:
            hint = f"say {{topk:{count}}} or less"
            raise Clash(self, f"{{topk}} is more than {{{mixed}}}", hint)
        if self.gate_per_site and self.gate in ("uniform", "random"):
            raise Clash(
                self,
                "{gate_per_site} needs a gate that is trained, found {gate}",
                "say {gate:soft}, or leave {gate_per_site:-} out",
            )
        return self


class PromptTuning(PromptMethod):
    """Prompts without a gate (Jia et al. 2022, as the paper compares with)."""

    method: Literal["prompt"] = Field(default="prompt", description="What is trained.")


class Lora(Section, panel="Method"):
    """Low-rank changes of linear layers (Hu et al. 2022), through peft."""

    method: Literal["lora"] = Field(default="lora", description="What is trained.")
    rank: int = Field(default=8, ge=1, description="LoRA: rank.")
    alpha: float | None = Field(default=None, gt=0, description="LoRA: scale is alpha / rank; default: alpha = rank.")
    targets: Annotated[str, Among(("qkv", "proj", "mlp"))] = Field(
        default="qkv,proj",
        pattern=r"^(qkv|proj|mlp)(,(qkv|proj|mlp))*$",
        description="LoRA: which linear layers, of qkv, proj and mlp.",
    )
    lr: float = Field(default=1e-4, gt=0, description="Learning rate of LoRA or full fine-tuning.")


class Full(Section, panel="Method"):
    """All weights of the backbone (full fine-tuning)."""

    method: Literal["full"] = Field(default="full", description="What is trained.")
    lr: float = Field(default=1e-4, gt=0, description="Learning rate of LoRA or full fine-tuning.")


# What `method` can be. One more kind: its class above, its name here, a case in models.build and a row in the contract suite.
Method = Dmp | PromptTuning | Lora | Full
METHODS: dict[str, type[Section]] = {kind.model_fields["method"].default: kind for kind in get_args(Method)}
