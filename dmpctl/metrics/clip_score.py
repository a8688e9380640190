"""CLIP score (Hessel et al. 2021, as torchmetrics has it): 100 times the cosine between an image and its caption, not below 0."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dmpctl.errors import IntegrityError


@dataclass(frozen=True)
class ClipScore:
    """Mean over N images, and its standard error (None for one image)."""

    value: float
    standard_error: float | None
    n: int


class ClipScorer:
    """A CLIP (Radford et al. 2021) in the files of transformers, frozen. IntegrityError where it cannot be read."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        kinds: tuple[Any, Any] = (transformers.CLIPModel, transformers.AutoProcessor)
        try:
            model, self._processor = (kind.from_pretrained(folder, local_files_only=True) for kind in kinds)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError, SafetensorError) as error:
            raise IntegrityError(
                f"{folder} is no CLIP that can be read: {str(error).splitlines()[0]}", "fetch it again"
            ) from None
        self._model: Any = model.float().to(device).eval().requires_grad_(False)
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Scores float64 [B] of images uint8 [B, 3, H, W] and their captions, each cut to what CLIP reads."""
        most = self._model.config.text_config.max_position_embeddings
        pixels = self._processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"].to(self._device)
        words = self._processor(text=list(captions), return_tensors="pt", padding=True, truncation=True, max_length=most)
        ids, mask = words["input_ids"].to(self._device), words["attention_mask"].to(self._device)
        model = self._model
        seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).double()
        read = model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output).double()
        return 100 * torch.cosine_similarity(seen, read).cpu()


def scores_to_clip_score(scores: Iterable[Tensor]) -> ClipScore:
    """The mean of scores [B] of batches, at least 0."""
    every = torch.cat(list(scores))
    error = float(every.std()) / math.sqrt(len(every)) if len(every) > 1 else None
    return ClipScore(max(float(every.mean()), 0.0), error, len(every))
