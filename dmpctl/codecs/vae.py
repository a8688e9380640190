"""The autoencoder of Stable Diffusion (Rombach et al. 2022): pixels to a Gaussian over latents, and back.

diffusers and the weights are loaded at the first image: where latents are cached, training needs neither.
"""

import hashlib
import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmpctl.codecs.identity import Identity
from dmpctl.errors import DmpError, IntegrityError, MissingError, UsageError
from dmpctl.files import read_json, sha256_of
from dmpctl.foreign.folders import MODEL, refuse_unsound_files, variant_of
from dmpctl.types import Moments

WEIGHTS = f"{MODEL}.safetensors"
DECIDING = (  # entries of the config that the weights do not tell
    "act_fn",
    "block_out_channels",
    "down_block_types",
    "latent_channels",
    "layers_per_block",
    "norm_num_groups",
    "scaling_factor",
    "shift_factor",
    "up_block_types",
)
SCALE = 0.18215  # Rombach et al. 2022, where the config has none
CHANNELS, PIXELS = 3, Identity()


class Vae:
    """diffusers' AutoencoderKL, frozen: float32 always, outside any autocast, at most `batch` images at once.

    `folder` holds config.json and the weights as diffusers saves them, or is a pipeline that has them in `vae/`. `name`
    is its name in records (vae-ema, ...). Latents are scaled: mean (m - shift) s, log variance v + 2 ln s. It works where its
    argument lies. Raises MissingError for a file that is not there, IntegrityError for one that is no such autoencoder.
    """

    def __init__(self, folder: Path, name: str, batch: int = 32) -> None:
        inside = folder / "vae"
        self.name, self.batch = name, batch
        self._folder = inside if (inside / "config.json").is_file() else folder
        variant = variant_of(self._folder) if self._folder.is_dir() else None
        self._variant, self._weights = variant, self._folder / (WEIGHTS if variant is None else f"{MODEL}.{variant}.safetensors")
        if not self._weights.is_file():
            raise MissingError(f"{self._folder} holds no autoencoder ({WEIGHTS})", "name a folder as diffusers saves it")
        config = read_json(self._folder / "config.json")
        try:
            self._config = {key: config.get(key) for key in DECIDING}
            self._latent_channels, self._factor = int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)
            self.scale, self._shift = float(config.get("scaling_factor", SCALE)), float(config.get("shift_factor") or 0)
        except (KeyError, TypeError, ValueError) as error:
            raise self._refused(f"its config.json: {error!r}") from None
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise self._refused(f"it holds a {config['_class_name']}")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the file of weights and the deciding entries of the config."""
        described = json.dumps(self._config, sort_keys=True)
        return hashlib.sha256(f"{sha256_of(self._weights)} {described}".encode()).hexdigest()

    def latent_shape(self, channels: int, size: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of colour images with this side in pixels.

        UsageError for grey images, which are not repeated in silence, and for a side that the blocks do not divide.
        """
        if channels != CHANNELS:
            raise UsageError(f"{self.name} takes images of {CHANNELS} channels, found {channels}", f"add --channels {CHANNELS}")
        if size % self._factor:
            low = size - size % self._factor or self._factor
            wanted = f"images whose side is a multiple of {self._factor}"
            raise UsageError(f"{self.name} takes {wanted}, found {size}", f"take --size {low}")
        return self._latent_channels, size // self._factor, size // self._factor

    def image_shape(self, latents: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the images behind latents of this shape; UsageError where its latents have other channels."""
        if latents[0] != self._latent_channels:
            raise UsageError(
                f"{self.name} has latents of {self._latent_channels} channels, the backbone takes {latents[0]}",
                "name the codec it was trained with: --codec",
            )
        return CHANNELS, latents[1] * self._factor, latents[2] * self._factor

    def encode(self, images: Tensor) -> Moments:
        """uint8 [B, 3, S, S] -> scaled mean and log variance, float32 [B, C, S / f, S / f] each, f = 8 for Stable Diffusion."""
        self.latent_shape(images.shape[1], images.shape[2])
        mean, logvar = self._in_parts(self._posterior, images).chunk(2, 1)
        return Moments((mean - self._shift) * self.scale, logvar + 2 * math.log(self.scale))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> uint8 [B, 3, f h, f w], rounded as `Identity.decode` does."""
        return PIXELS.decode(self._in_parts(self._pixels, latents.to(torch.float32) / self.scale + self._shift))

    def _posterior(self, images: Tensor) -> Tensor:
        found = self._model.encode(PIXELS.encode(images).mean).latent_dist
        return torch.cat([found.mean, found.logvar], 1)

    def _pixels(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self._model.decode(latents).sample
        return decoded

    @torch.no_grad()
    def _in_parts(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        self._model.to(batch.device)
        with torch.autocast(batch.device.type, enabled=False):
            return torch.cat([function(part) for part in torch.split(batch, self.batch)]).contiguous()

    @cached_property
    def _model(self) -> Any:
        """The frozen autoencoder; IntegrityError where the file does not hold exactly what the config asks for."""
        from diffusers import AutoencoderKL

        load: Any = AutoencoderKL.from_pretrained
        options = {"torch_dtype": torch.float32, "variant": self._variant, "local_files_only": True, "output_loading_info": True}
        with torch.inference_mode(False):
            try:
                model, found = load(self._folder, use_safetensors=True, **options)
            except (OSError, ValueError, RuntimeError, TypeError) as error:
                raise self._refused(str(error).splitlines()[0].split(". ")[0]) from None
            refuse_unsound_files(self._folder)
            wrong = [f"{kind.removesuffix('_keys')} {key}" for kind, keys in found.items() for key in keys]
            if wrong:
                raise self._refused(f"{wrong[0]} ({len(wrong)} such keys)")
            return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # encoding takes a fifth less

    def _refused(self, why: str) -> DmpError:
        return IntegrityError(f"{self._folder} is no autoencoder that can be read: {why}", "fetch it again, or name another one")
