"""Captions to the states that text-conditional backbones attend to: CLIP (Radford et al. 2021) and T5 (Raffel et al. 2020).

transformers and the weights are loaded at the first caption: where states are cached, training needs neither.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, assert_never

import torch
from safetensors import SafetensorError
from torch import Tensor

from dmpctl.errors import DmpError, IntegrityError, MissingError, UsageError
from dmpctl.files import read_json, sha256_of
from dmpctl.foreign.folders import ENCODER, refuse_unsound_files, variant_of
from dmpctl.types import Cleaning

T5_TOKENS = 120  # PixArt-alpha's; a T5 takes any number
KINDS = ("clip", "clip_text_model", "t5")
READ = (".json", ".txt", ".model", ".safetensors")  # files that decide the states


def usual_cleaning(kind: str) -> Cleaning:
    """Returns how diffusers prepares captions: PixArt's, which T5 reads, are cleaned if two packages are there, CLIP's not."""
    if kind != "t5":
        return "none"
    return "pixart" if all(map(find_spec, ("bs4", "ftfy"))) else "lower"


def cleaned(captions: Sequence[str], cleaning: Cleaning) -> list[str]:
    """Captions as an encoder reads them. MissingError for PixArt's whole cleaning where its packages are not installed."""
    match cleaning:
        case "none":
            return list(captions)
        case "lower":
            return [caption.lower().strip() for caption in captions]
        case "pixart":
            if usual_cleaning("t5") != "pixart":
                raise MissingError("captions were cleaned with beautifulsoup4 and ftfy", "pip install beautifulsoup4 ftfy")
            from diffusers import PixArtAlphaPipeline

            kind: Any = PixArtAlphaPipeline  # untyped; what is called needs no part of a pipeline
            found: list[str] = kind._text_preprocessing(object.__new__(kind), list(captions), clean_caption=True)
            return found
        case _:
            assert_never(cleaning)


class TextEncoder:
    """The text encoder and the tokenizer in `folder`: of a pipeline (text_encoder/ and tokenizer/), or both in one place.

    `name`: its name in records; `tokens` per caption, None: CLIP's own 77, T5 120; longer captions are cut. States are those
    of the last layer, float32; padding is hidden from T5, and lies behind the words for CLIP, which never looks ahead.
    `cleaning` of captions before, None: what diffusers does here for the backbones that read this kind (`usual_cleaning`).
    Raises MissingError for a file that is not there, IntegrityError for one that cannot be read, UsageError for another kind.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        tokens: int | None = None,
        device: torch.device | str = "cpu",
        cleaning: Cleaning | None = None,
    ) -> None:
        self.name, self._device = name, torch.device(device)
        self._folder = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
        self._words = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        for path in (self._folder / "config.json", self._words / "tokenizer_config.json"):
            if not path.is_file():
                raise MissingError(f"{path} is not there", "name a folder with a text encoder and its tokenizer")
        config = read_json(self._folder / "config.json")
        self._kind = str(config.get("model_type"))
        if self._kind not in KINDS:
            raise UsageError(f"{self._folder} holds a model of type {self._kind}, no text encoder that is known", "CLIP or T5")
        self.cleaning = usual_cleaning(self._kind) if cleaning is None else cleaning
        text = config.get("text_config") or config
        try:
            self.width = int(config["d_model"] if self._kind == "t5" else text["hidden_size"])
            most = None if self._kind == "t5" else int(text.get("max_position_embeddings", 77))
        except (KeyError, TypeError, ValueError) as error:
            raise self._refused(f"its config.json: {error!r}") from None
        self.max_length = tokens or most or T5_TOKENS
        if most is not None and self.max_length > most:
            raise UsageError(f"{name} takes at most {most} tokens, --text-tokens says {tokens}", f"take {most} or fewer")

    @cached_property
    def revision(self) -> str:
        """sha256 over the files of encoder and tokenizer, and how captions are cleaned."""
        digest = hashlib.sha256(b"" if self.cleaning == "none" else f"cleaning {self.cleaning}\n".encode())
        for folder in dict.fromkeys((self._folder, self._words)):
            for path in sorted(path for path in folder.iterdir() if path.suffix in READ):
                digest.update(f"{path.name} {sha256_of(path)}\n".encode())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States float32 [B, T, D], and bool [B, T] where a token is no padding, on the CPU."""
        tokenizer, model = self._parts
        found = tokenizer(
            cleaned(captions, self.cleaning),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self._device)
        mask = found.attention_mask
        seen = {"attention_mask": mask} if self._kind == "t5" else {}
        with torch.autocast(self._device.type, enabled=False):
            states = model(found.input_ids, **seen).last_hidden_state
        return states.float().cpu(), mask.bool().cpu()

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        """Tokenizer and frozen encoder."""
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

        kind: Any = transformers.T5EncoderModel if self._kind == "t5" else transformers.CLIPTextModel
        words: Any = transformers.AutoTokenizer
        with torch.inference_mode(False):
            try:
                tokenizer = words.from_pretrained(self._words, local_files_only=True)
                options = {"dtype": torch.float32, "variant": variant_of(self._folder, ENCODER), "output_loading_info": True}
                model, found = kind.from_pretrained(self._folder, local_files_only=True, use_safetensors=True, **options)
            except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError, SafetensorError) as error:
                raise self._refused(str(error).splitlines()[0]) from None
            refuse_unsound_files(self._folder, stem=ENCODER, floats=False)
            if found["missing_keys"]:
                raise self._refused(f"it lacks {sorted(found['missing_keys'])[0]}")
            return tokenizer, model.to(self._device).eval().requires_grad_(False)

    def _refused(self, why: str) -> DmpError:
        return IntegrityError(f"{self._folder} is no text encoder that can be read: {why}", "fetch it again, or name another one")
