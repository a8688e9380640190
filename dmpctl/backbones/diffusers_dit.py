"""The DiT of diffusers (DiTTransformer2DModel, facebook/DiT-XL-2-256): its own key layout, and nearly the original function.

It embeds time with frequencies 10000^(-i / 127) where the original has 10000^(-i / 128) (`downscale_freq_shift`), and every
block holds its own copy of the embedders of time and label, all equal in the published conversion.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmpctl.backbones.dit import DiTConfig
from dmpctl.backbones.sites import AlikeBlocks, needed
from dmpctl.types import BackboneSpec


class DiffusersDiT(AlikeBlocks):
    """DiTTransformer2DModel as a backbone. Conditions are labels int64 [B]; the last row of its table is the null class."""

    @property
    def spec(self) -> BackboneSpec:
        """Latent shape, sites, schedule, classes and size."""
        classes = self.model.config.num_embeds_ada_norm
        return self._spec(num_classes=classes, null_class=classes)

    @property
    def _embedder(self) -> Any:
        return self.model.transformer_blocks[0].norm1.emb

    def _embed(self, t: Tensor, cond: Tensor | None) -> Tensor:
        c: Tensor = self._embed_time(t) + self._embedder.class_embedder(needed(cond, "labels"))
        return c

    def _cond(self, arguments: Mapping[str, Tensor]) -> Tensor | None:
        return arguments.get("class_labels")

    def _predict(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        prediction: Tensor = self.model(x, timestep=t, class_labels=cond, return_dict=False)[0]
        return prediction


def to_original(model: DiffusersDiT) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Returns config and state dict of these weights in the original layout.

    The two compute the same where this model's `time_proj.downscale_freq_shift` is 0; as diffusers publishes it, it is 1,
    so that the original function is the one the weights were trained for. ValueError where the blocks' embedders differ,
    which the original layout cannot hold.
    """
    source, config = model.model.state_dict(), model.model.config
    first = "transformer_blocks.0.norm1.emb."
    embedders = [name.removeprefix(first) for name in source if name.startswith(first)]
    for number in range(1, config.num_layers):
        own = f"transformer_blocks.{number}.norm1.emb."
        if not all(torch.equal(source[first + name], source[own + name]) for name in embedders):
            raise ValueError(f"block {number} embeds time or labels in a way of its own")
    renamed = {
        "pos_embed.proj": "x_embedder.proj",
        f"{first}timestep_embedder.linear_1": "t_embedder.mlp.0",
        f"{first}timestep_embedder.linear_2": "t_embedder.mlp.2",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    for number in range(config.num_layers):
        theirs, ours = f"transformer_blocks.{number}", f"blocks.{number}"
        renamed |= {
            f"{theirs}.norm1.linear": f"{ours}.adaLN_modulation.1",
            f"{theirs}.attn1.to_out.0": f"{ours}.attn.proj",
            f"{theirs}.ff.net.0.proj": f"{ours}.mlp.fc1",
            f"{theirs}.ff.net.2": f"{ours}.mlp.fc2",
        }
    tensors = {f"{ours}.{kind}": source[f"{theirs}.{kind}"] for theirs, ours in renamed.items() for kind in ("weight", "bias")}
    for number in range(config.num_layers):
        for kind in ("weight", "bias"):
            parts = [source[f"transformer_blocks.{number}.attn1.to_{part}.{kind}"] for part in "qkv"]
            tensors[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
    tensors["y_embedder.embedding_table.weight"] = source[f"{first}class_embedder.embedding_table.weight"]
    tensors["pos_embed"] = model.model.pos_embed.pos_embed.detach().clone()
    sizes = (config.sample_size, config.in_channels, config.patch_size, model.model.inner_dim)
    shape = DiTConfig(*sizes, config.num_layers, config.num_attention_heads, model.spec.num_classes)
    return replace(shape, learned_sigma=model.spec.learned_sigma), tensors
