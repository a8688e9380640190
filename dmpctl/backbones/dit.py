"""The Diffusion Transformer of Peebles & Xie (2023) in its published key layout, one pure-torch file.

SiT (Ma et al. 2024, arXiv 2401.08740) is this network, which predicts a velocity under the schedule "flow".
The only addition: `denoise` takes `edit(site, tokens) -> tokens`, called on the input of every block.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmpctl.errors import UsageError
from dmpctl.store.shapes import FLOWS, SHAPES, TEXT, is_shape
from dmpctl.types import BackboneSpec, Edit, ScheduleSpec, Site

FREQUENCIES = 256  # width of the sinusoidal timestep embedding, fixed in the published model


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT. `input_size` and `channels` are those of the latents; `num_classes` 0 means unconditional.

    `null_class` False: the label table has no extra row, so labels cannot be dropped. `from_data`, of a flow: the network counts
    time from images (0) to noise (1) and predicts noise - x0, as REPA and LFM; else the other way round, as SiT.
    """

    input_size: int
    channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    num_classes: int = 1000
    null_class: bool = True
    learned_sigma: bool = True
    from_data: bool = False

    def __post_init__(self) -> None:
        """UsageError for sizes that make no model."""
        sizes = (self.input_size, self.channels, self.patch_size, self.hidden_size, self.depth, self.num_heads)
        if any(type(size) is not int or size < 1 for size in sizes) or type(self.num_classes) is not int or self.num_classes < 0:
            raise UsageError(f"sizes of a DiT are whole and positive, found {self}")
        if self.input_size % self.patch_size:
            raise UsageError(f"patches of {self.patch_size} do not tile images of side {self.input_size}")
        for divisor, reason in ((4, "as its position table has four parts"), (self.num_heads, "its number of heads")):
            if self.hidden_size % divisor:
                raise UsageError(f"a DiT's width must be a multiple of {divisor}, {reason}; found {self.hidden_size}")

    @property
    def tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learned_sigma else 1)

    @property
    def label_rows(self) -> int:
        """Rows of the label table: the classes and the null class; one row when unconditional."""
        return self.num_classes + self.null_class if self.num_classes else 1


def shape_config(name: str, input_size: int = 32, num_classes: int = 0) -> DiTConfig | None:
    """Config of a published shape such as `DiT-L/2` or `SiT-L/2`; None if `name` is no such shape."""
    if not is_shape(name) or name.endswith(TEXT):
        return None
    shape, _, patch = name.partition("/")
    width, depth, heads = (SHAPES | FLOWS)[shape]
    return DiTConfig(input_size, 4, int(patch), width, depth, heads, num_classes)


def sincos_table(width: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine position table [side * side, width] (He et al. 2022), columns first."""
    rates = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    axis = torch.arange(side, dtype=torch.float64)[:, None] * rates
    axis = torch.cat([axis.sin(), axis.cos()], dim=1)  # [side, width / 2]
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1).float()


def timestep_features(t: Tensor) -> Tensor:
    """Sinusoidal features [B, 256] of timesteps [B]: cosines first."""
    half = FREQUENCIES // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: scale and shift tokens x [B, T, D] by per-sample vectors [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two layers, four times wider inside, GELU in its tanh form."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One adaLN-Zero transformer block: x [B, T, D], c [B, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] to tokens [B, T, D], one per square of side `patch`."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class TimestepEmbedder(nn.Module):
    """Timesteps [B] to vectors [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_features(t))  # type: ignore[no-any-return]


class LabelEmbedder(nn.Module):
    """Labels [B] to vectors [B, D]; the last row is the null class."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    """adaLN, then a linear map of every token to its square of the prediction."""

    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # type: ignore[no-any-return]


class DiT(nn.Module):
    """The published DiT; satisfies `types.Backbone`. Freezing is the caller's (`models.backbone`).

    `recompute`: blocks keep their input alone and are run again in the backward pass.
    """

    pos_embed: Tensor
    recompute: bool = False

    def __init__(self, config: DiTConfig, schedule: ScheduleSpec | None = None) -> None:
        super().__init__()
        self.config = config
        self.schedule = schedule or ScheduleSpec()
        d = config.hidden_size
        self.x_embedder = PatchEmbed(config.channels, d, config.patch_size)
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = LabelEmbedder(config.label_rows, d)
        self.register_buffer("pos_embed", sincos_table(d, config.input_size // config.patch_size)[None])
        self.blocks = nn.ModuleList(Block(d, config.num_heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch_size, config.out_channels)

    @property
    def spec(self) -> BackboneSpec:
        """Latent shape, sites, schedule, conditions and size."""
        c = self.config
        return BackboneSpec(
            latent_shape=(c.channels, c.input_size, c.input_size),
            sites=(Site(c.tokens, c.hidden_size),) * c.depth,
            prediction="velocity" if self.schedule.kind == "flow" else "epsilon",
            learned_sigma=c.learned_sigma,
            schedule=self.schedule,
            num_classes=c.num_classes,
            null_class=c.num_classes if c.num_classes and c.null_class else None,
            parameters=sum(tensor.numel() for tensor in self.parameters()),
        )

    @property
    def linears(self) -> Mapping[str, tuple[str, ...]]:
        """Ends of the names of the linear layers inside the blocks, by their purpose."""
        return {"qkv": ("attn.qkv",), "proj": ("attn.proj",), "mlp": ("mlp.fc1", "mlp.fc2")}

    @property
    def block_names(self) -> tuple[str, ...]:
        """`blocks.0` and so on."""
        return tuple(f"blocks.{number}" for number in range(self.config.depth))

    # Each of the next four is entered from outside; none calls another, as each may be wrapped (training.fsdp).

    def embed(self, t: Tensor, cond: Tensor | None) -> Tensor:
        """c = t_emb + y_emb [B, D]; an unconditional model adds its single row of the label table.

        ValueError for a class-conditional model without labels.
        """
        return self._embed(t, cond)

    def embed_time(self, t: Tensor) -> Tensor:
        """t_emb [B, D] alone."""
        return self.t_embedder(self._time(t))  # type: ignore[no-any-return]

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor | None, edit: Edit | None = None) -> Tensor:
        """Prediction [B, C or 2C, H, W] for noised x [B, C, H, W] at timesteps t [B]."""
        return self._denoise(x, t, cond, edit)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None, edit: Edit | None = None) -> Tensor:
        """`denoise`, so that the module can be wrapped for many processes when it is trained."""
        return self._denoise(x, t, cond, edit)

    def _embed(self, t: Tensor, cond: Tensor | None) -> Tensor:
        if cond is None and self.config.num_classes:
            raise ValueError("a class-conditional backbone needs labels")
        row = self.y_embedder.embedding_table.weight[0] if cond is None else self.y_embedder(cond)
        c: Tensor = self.t_embedder(self._time(t)) + row
        return c

    def _time(self, t: Tensor) -> Tensor:
        """t as the network counts it: a SiT from noise (0) to images (1)."""
        if self.schedule.kind != "flow":
            return t
        level = t / self.schedule.steps
        return level if self.config.from_data else 1 - level

    def _denoise(self, x: Tensor, t: Tensor, cond: Tensor | None, edit: Edit | None) -> Tensor:
        c = self._embed(t, cond)
        tokens: Tensor = self.x_embedder(x) + self.pos_embed
        for site, block in enumerate(self.blocks):
            if edit is not None:
                tokens = edit(site, tokens)
            again = self.recompute and tokens.requires_grad
            tokens = checkpoint(block, tokens, c, use_reentrant=False) if again else block(tokens, c)
        squares = self.final_layer(tokens, c)[:, -self.config.tokens :]  # prepended prompts fall away
        prediction = self._unpatchify(squares)
        return -prediction if self.config.from_data else prediction

    def _unpatchify(self, squares: Tensor) -> Tensor:
        """[B, T, p * p * C] to [B, C, H, W]; inside a token the order is row, column, channel."""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        grid = squares.reshape(-1, side, side, p, p, self.config.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.out_channels, side * p, side * p)

    def initialise(self, generator: torch.Generator) -> None:
        """Draws the published initialisation (adaLN-Zero): linear layers Xavier, modulations and output zero."""
        drawn = [self.y_embedder.embedding_table.weight]
        drawn += [layer.weight for layer in self.t_embedder.mlp if isinstance(layer, nn.Linear)]
        zero = [self.final_layer.linear, *(part.adaLN_modulation[-1] for part in (*self.blocks, self.final_layer))]
        start_afresh(self, self.x_embedder.proj, [(weight, 0.02) for weight in drawn], zero, generator)


@torch.no_grad()
def start_afresh(
    model: nn.Module,
    patches: nn.Conv2d,
    normal: Iterable[tuple[Tensor, float]],
    zero: Iterable[nn.Module],
    generator: torch.Generator,
) -> None:
    """Draws the weights of a transformer over patches in place: linear layers Xavier, biases zero.

    `patches`: the layer that makes tokens, Xavier as if it were linear. `normal`: (weights, standard deviation) that are drawn
    from a normal distribution. `zero`: layers that start at zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1), generator=generator)
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    for weight, deviation in normal:
        nn.init.normal_(weight, std=deviation, generator=generator)
    for layer in zero:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
