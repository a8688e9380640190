"""Stable Diffusion's U-Net (Rombach et al. 2022; v1.5) as a backbone.

The paper patches it and does not say how. Ours: sites are the inputs of its transformer blocks, after the projection in, where
an image is tokens: 4096, 1024, 256 and 64 of widths 320, 640 and 1280 for 64x64 latents. Each site has prompts of its own, one
per token; the gate sees the time embedding (1280 numbers), as no vector of the caption's exists; sites of one size share a gate.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, assert_never

from torch import Tensor, nn

from dmpctl.backbones.sites import Hooked, needed, numbers_in
from dmpctl.types import BackboneSpec, ScheduleSpec, Site, TextSpec, text_parts

TOKENS = 77  # of a caption: CLIP's
Half = Literal["down", "mid", "up"]


class SdUnet(Hooked):
    """UNet2DConditionModel as a backbone. Conditions are text [B, T, D + 1]; as in Stable Diffusion, padding is attended to."""

    def __init__(self, model: nn.Module, schedule: ScheduleSpec | None = None, text_tokens: int | None = None) -> None:
        """ValueError for a U-Net that needs more than timestep and text, such as SDXL's."""
        config: Any = model.config
        if config.addition_embed_type is not None or config.class_embed_type is not None or config.time_cond_proj_dim is not None:
            raise ValueError("this U-Net needs more than a timestep and a caption")
        blocks = list(transformer_blocks(model))
        super().__init__(model, [name for name, _ in blocks], schedule or ScheduleSpec("scaled-linear"), text_tokens)
        self._scales = tuple(scale for _, scale in blocks)

    @property
    def spec(self) -> BackboneSpec:
        """Latent shape, sites, schedule, captions and size."""
        model, config = self.model, self.model.config
        blocks: list[Any] = [self.get_submodule(name) for name in self.block_names]
        sides = [config.sample_size // scale for scale in self._scales]
        return BackboneSpec(
            latent_shape=(config.in_channels, config.sample_size, config.sample_size),
            sites=tuple(Site(side * side, block.dim) for side, block in zip(sides, blocks, strict=True)),
            prediction="epsilon",
            learned_sigma=False,
            schedule=self.schedule,
            num_classes=0,
            text=TextSpec(self.text_tokens or TOKENS, config.cross_attention_dim),
            cond_width=model.time_embedding.linear_2.out_features,
            parameters=numbers_in(model),
            inference=self.inference,
        )

    def _embed(self, t: Tensor, cond: Tensor | None) -> Tensor:
        return self._embed_time(t)

    @property
    def _time_embedder(self) -> tuple[Any, Any]:
        return self.model.time_proj, self.model.time_embedding

    def _cond(self, arguments: Mapping[str, Tensor]) -> None:
        """None: the gate sees no caption."""

    def _predict(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        states, _ = text_parts(needed(cond, "captions"))
        prediction: Tensor = self.model(x, t, encoder_hidden_states=states, return_dict=False)[0]
        return prediction


def transformer_blocks(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name of each transformer block of a U-Net in the order they run, and by how much its image is smaller than the latent."""
    unet: Any = model
    scale = 1
    for number, block in enumerate(unet.down_blocks):
        yield from _inside(f"down_blocks.{number}", block, scale)
        scale *= 2 if block.downsamplers is not None else 1
    if unet.mid_block is not None:
        yield from _inside("mid_block", unet.mid_block, scale)
    for number, block in enumerate(unet.up_blocks):
        yield from _inside(f"up_blocks.{number}", block, scale)
        scale //= 2 if block.upsamplers is not None else 1


def _inside(name: str, block: Any, scale: int) -> Iterator[tuple[str, int]]:
    for number, attention in enumerate(getattr(block, "attentions", None) or ()):
        for inner in range(len(attention.transformer_blocks)):
            yield f"{name}.attentions.{number}.transformer_blocks.{inner}", scale


def sites_in(block_names: tuple[str, ...], half: Half) -> tuple[int, ...]:
    """The sites in the down, middle or up part."""
    match half:
        case "down" | "up":
            start = f"{half}_blocks."
        case "mid":
            start = "mid_block."
        case _:
            assert_never(half)
    return tuple(site for site, name in enumerate(block_names) if name.startswith(start))
