"""Edits in models that others wrote: a hook on each transformer block. The only hooks there are.

A subclass names the blocks, and the arguments that hold time and conditions in a model of its kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmpctl.types import BackboneSpec, Edit, Inference, ScheduleSpec, Site, TextSpec

Keywords = dict[str, object]  # of a call


class EditInForce:
    """The edit that the hooks of one model look up. A copy of the model has one of its own."""

    edit: Edit | None = None


class SiteHook:
    """Before a block: puts the edit in force on its tokens, the first argument [B, T, D]."""

    def __init__(self, held: EditInForce, site: int) -> None:
        self._held, self._site = held, site

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: Keywords) -> tuple[tuple[Any, ...], Keywords]:
        if self._held.edit is None:
            return args, kwargs
        tokens, *rest = args
        return (self._held.edit(self._site, tokens), *rest), kwargs


class LastTokens:
    """Before the layer behind the blocks: keeps the tokens of the image alone, so that prepended prompts fall away."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, *rest = args
        return tokens[:, -self._count :], *rest


class Hooked(nn.Module, ABC):
    """A model of diffusers that satisfies `types.Backbone`. Its parts and parameters keep the names they have in `model`.

    `text_tokens`: of a caption, where it takes any number; None: as many as is usual for its kind, or no captions.
    Freezing is the caller's (`models.backbone`).
    """

    def __init__(
        self, model: nn.Module, block_names: Sequence[str], schedule: ScheduleSpec, text_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.text_tokens = text_tokens
        self.inference: Inference | None = None
        self._model, self._names, self.schedule = (model,), tuple(block_names), schedule  # in a tuple it is no submodule
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._held, self._recompute = EditInForce(), False
        for site, name in enumerate(block_names):
            model.get_submodule(name).register_forward_pre_hook(SiteHook(self._held, site), with_kwargs=True)

    @property
    def model(self) -> Any:
        """The model of diffusers itself."""
        return self._model[0]

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks, in the order in which they run."""
        return self._names

    @property
    def recompute(self) -> bool:
        """Whether blocks keep their input alone and are run again in the backward pass."""
        return self._recompute

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        self._recompute = wanted
        if wanted:
            self.model.enable_gradient_checkpointing()

    @property
    @abstractmethod
    def spec(self) -> BackboneSpec:
        """Latent shape, sites, schedule, conditions and size."""

    @property
    def linears(self) -> Mapping[str, tuple[str, ...]]:
        """Ends of the names of the linear layers inside the blocks, by their purpose; attention to text included."""
        attentions = ("attn1", "attn2")
        return {
            "qkv": tuple(f"{attention}.to_{part}" for attention in attentions for part in "qkv"),
            "proj": tuple(f"{attention}.to_out.0" for attention in attentions),
            "mlp": ("ff.net.0.proj", "ff.net.2"),
        }

    def told(self, arguments: Mapping[str, object]) -> tuple[Tensor, Tensor | None]:
        """Returns timesteps [B] and conditions, for `embed`, of a call of `model` with these arguments."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        x, t = next(iter(tensors.values())), torch.as_tensor(arguments["timestep"])
        return t.to(x.device).reshape(-1).expand(len(x)) if t.numel() == 1 else t.to(x.device), self._cond(tensors)

    def put_in_force(self, edit: Edit | None) -> None:
        """Edits calls of `model` itself, by others, from now on; None: no more."""
        self._held.edit = edit

    # Each of the next four is entered from outside; none calls another, as each may be wrapped (training.fsdp).

    def embed(self, t: Tensor, cond: Tensor | None) -> Tensor:
        """c [B, D] of timesteps t [B] and conditions."""
        return self._embed(t, cond)

    def embed_time(self, t: Tensor) -> Tensor:
        """The timestep's share of c, [B, D]."""
        return self._embed_time(t)

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor | None, edit: Edit | None = None) -> Tensor:
        """Prediction [B, C or 2C, H, W] for noised x [B, C, H, W] at timesteps t [B]."""
        return self._denoise(x, t, cond, edit)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None, edit: Edit | None = None) -> Tensor:
        """`denoise`, so that the module can be wrapped for many processes when it is trained."""
        return self._denoise(x, t, cond, edit)

    def _denoise(self, x: Tensor, t: Tensor, cond: Tensor | None, edit: Edit | None) -> Tensor:
        self._held.edit = edit
        try:
            return self._predict(x, t, cond)
        finally:
            if not self._recompute:  # the backward pass runs the blocks again, with this edit
                self._held.edit = None

    def _embed_time(self, t: Tensor) -> Tensor:
        features, embedder = self._time_embedder
        embedded: Tensor = embedder(features(t).to(embedder.linear_1.weight.dtype))
        return embedded

    @property
    @abstractmethod
    def _time_embedder(self) -> tuple[Any, Any]:
        """The modules that make features of timesteps, and a vector [B, D] of these."""

    @abstractmethod
    def _embed(self, t: Tensor, cond: Tensor | None) -> Tensor:
        """c of timesteps and conditions."""

    @abstractmethod
    def _cond(self, arguments: Mapping[str, Tensor]) -> Tensor | None:
        """The conditions among the tensors that `model` was called with, as `embed` takes them."""

    @abstractmethod
    def _predict(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """The model's own call."""


class AlikeBlocks(Hooked):
    """A transformer of diffusers over square patches, whose blocks (`transformer_blocks`) all have as many tokens."""

    def __init__(self, model: Any, schedule: ScheduleSpec | None = None, text_tokens: int | None = None) -> None:
        names = [f"transformer_blocks.{number}" for number in range(model.config.num_layers)]
        super().__init__(model, names, schedule or ScheduleSpec(), text_tokens)
        model.norm_out.register_forward_pre_hook(LastTokens(self._site.tokens))

    @property
    def _site(self) -> Site:
        config = self.model.config
        return Site((config.sample_size // config.patch_size) ** 2, self.model.inner_dim)

    def _spec(self, num_classes: int = 0, null_class: int | None = None, text: TextSpec | None = None) -> BackboneSpec:
        config = self.model.config
        return BackboneSpec(
            latent_shape=(config.in_channels, config.sample_size, config.sample_size),
            sites=(self._site,) * config.num_layers,
            prediction="epsilon",
            learned_sigma=self.model.out_channels == 2 * config.in_channels,
            schedule=self.schedule,
            num_classes=num_classes,
            null_class=null_class,
            text=text,
            parameters=numbers_in(self.model),
            inference=self.inference,
        )

    @property
    @abstractmethod
    def _embedder(self) -> Any:
        """The module that embeds time, among other things."""

    @property
    def _time_embedder(self) -> tuple[Any, Any]:
        return self._embedder.time_proj, self._embedder.timestep_embedder


def needed(cond: Tensor | None, what: str) -> Tensor:
    """The conditions; ValueError where there are none and the network needs `what`."""
    if cond is None:
        raise ValueError(f"this backbone needs {what}")
    return cond


def numbers_in(model: nn.Module) -> int:
    """How many numbers a model holds in its parameters."""
    return sum(tensor.numel() for tensor in model.parameters())
