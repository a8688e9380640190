"""PixArt's transformer (Chen et al. 2023, arXiv 2310.00426) as the text-conditional DiT: attention to the caption in every block.

Of any size, from its config; the paper's text DiT is `DiT-B/2-text` (models.backbone), as its published code has none.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from dmpctl.backbones.dit import DiTConfig, start_afresh
from dmpctl.backbones.sites import AlikeBlocks, needed
from dmpctl.types import BackboneSpec, TextSpec, text_parts

TOKENS = 120  # of a caption: PixArt-alpha's; the model itself takes any number
PIXELS = 8  # side of the square that one latent stands for, where the model is told of the size of its images


class PixArt(AlikeBlocks):
    """PixArtTransformer2DModel as a backbone. Conditions are text [B, T, D + 1] (`types.text_parts`); padding is left out.

    c is the embedded timestep plus the mean of the caption's projected states: the gate's `t+y`. `text_tokens`: T, None: 120.
    """

    @property
    def spec(self) -> BackboneSpec:
        """Latent shape, sites, schedule, captions and size."""
        return self._spec(text=TextSpec(self.text_tokens or TOKENS, self.model.config.caption_channels))

    @property
    def _embedder(self) -> Any:
        return self.model.adaln_single.emb

    def _embed(self, t: Tensor, cond: Tensor | None) -> Tensor:
        states, mask = text_parts(needed(cond, "captions"))
        projected = self.model.caption_projection(states)
        weights = mask.to(projected.dtype).unsqueeze(-1)
        mean: Tensor = (projected * weights).sum(1) / weights.sum(1).clamp(min=1)
        return self._embed_time(t) + mean

    def _cond(self, arguments: Mapping[str, Tensor]) -> Tensor:
        states, mask = arguments["encoder_hidden_states"], arguments.get("encoder_attention_mask")
        if mask is None:
            mask = states.new_ones(states.shape[:2])
        elif mask.ndim == 3:  # a bias: 0 where a token counts
            mask = mask.squeeze(1) > -1
        return torch.cat([states, mask.to(states.dtype).unsqueeze(-1)], -1)

    def _predict(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        states, mask = text_parts(needed(cond, "captions"))
        prediction: Tensor = self.model(
            x,
            encoder_hidden_states=states,
            timestep=t,
            encoder_attention_mask=mask.to(x.dtype),
            added_cond_kwargs=self._sizes(x),
            return_dict=False,
        )[0]
        return prediction

    def _sizes(self, x: Tensor) -> dict[str, Tensor | None]:
        """Further conditions of a model for 1024x1024 images: their size, and that they are square."""
        if not self.model.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        side = float(PIXELS * self.model.config.sample_size)
        return {"resolution": x.new_full((len(x), 2), side), "aspect_ratio": x.new_ones(len(x), 1)}

    def initialise(self, generator: torch.Generator) -> None:
        """Draws a fresh model: linear layers Xavier; attention to text and output zero, so that blocks start without them."""
        model = self.model
        tables = [tensor for name, tensor in self.named_parameters() if name.endswith("scale_shift_table")]
        single, caption, timestep = model.adaln_single, model.caption_projection, model.adaln_single.emb.timestep_embedder
        layers = (timestep.linear_1, timestep.linear_2, single.linear, caption.linear_1, caption.linear_2)
        start_afresh(
            self,
            model.pos_embed.proj,
            [*((table, model.inner_dim**-0.5) for table in tables), *((layer.weight, 0.02) for layer in layers)],
            [model.proj_out, *(block.attn2.to_out[0] for block in model.transformer_blocks)],
            generator,
        )


def fresh(config: DiTConfig, text: TextSpec) -> nn.Module:
    """A PixArtTransformer2DModel in the sizes of a DiT, with diffusers' own random start. Its labels say nothing here."""
    from diffusers import PixArtTransformer2DModel

    kind: Any = PixArtTransformer2DModel  # untyped
    model: nn.Module = kind(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        cross_attention_dim=config.hidden_size,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        caption_channels=text.width,
        use_additional_conditions=False,
        interpolation_scale=1,
    )
    return model


def plain_config(model: nn.Module) -> dict[str, JsonValue]:
    """Config of a model as diffusers saves it, without the entries about the file and version it was saved with."""
    config: Any = model.config
    return {"_class_name": type(model).__name__, **{key: value for key, value in config.items() if not key.startswith("_")}}
