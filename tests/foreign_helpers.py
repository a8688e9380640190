"""Tiny models of diffusers and transformers with random weights, in the files that these libraries write."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_text_encoder.py"
_spec = importlib.util.spec_from_file_location("tiny_text_encoder", EXAMPLE)
encoder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(encoder)
LETTERS, TOKENS = encoder.LETTERS, encoder.TOKENS
WIDTH = 16  # of the tiny encoders' states
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 5}
UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "sample_size": 8,
    "cross_attention_dim": WIDTH,
}


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight random, so that no path is dead."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.15, generator=draw)
    return model.eval().requires_grad_(False)


def tiny_dit(**config: Any) -> torch.nn.Module:
    """A DiTTransformer2DModel with five classes whose blocks share the embedders of time and label, as converted ones do."""
    from diffusers import DiTTransformer2DModel

    model = randomised(DiTTransformer2DModel(**{**DIT, "in_channels": 4, "out_channels": 8, **config}))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def tiny_pixart(**config: Any) -> torch.nn.Module:
    """A PixArtTransformer2DModel."""
    from diffusers import PixArtTransformer2DModel

    sizes = {key: value for key, value in DIT.items() if key != "num_embeds_ada_norm"}
    return randomised(PixArtTransformer2DModel(**{**sizes, "caption_channels": WIDTH, "cross_attention_dim": 16, **config}))


def tiny_unet(**config: Any) -> torch.nn.Module:
    """A UNet2DConditionModel with transformer blocks at two scales: sites of 64 x 8 and, in its middle, 16 x 16."""
    from diffusers import UNet2DConditionModel

    return randomised(UNet2DConditionModel(**{**UNET, **config}))


def tiny_clip(folder: Path, seed: int = 0, width: int = WIDTH) -> Path:
    """A CLIP text encoder and its tokenizer of single letters, as a pipeline holds them: text_encoder/ and tokenizer/."""
    return encoder.write_encoder(folder, seed, width)


def pipeline(folder: Path, model: torch.nn.Module, schedule: str | None = None, text: bool = False) -> Path:
    """A folder as diffusers saves a pipeline: model_index.json, the model, its scheduler, and an encoder of captions."""
    part = "unet" if type(model).__name__ == "UNet2DConditionModel" else "transformer"
    model.save_pretrained(folder / part)
    (folder / "model_index.json").write_text(json.dumps({part: ["diffusers", type(model).__name__]}))
    if schedule is not None:
        start, end = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[schedule]
        about = {"beta_schedule": schedule, "beta_start": start, "beta_end": end, "num_train_timesteps": 1000}
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(about))
    if text:
        tiny_clip(folder)
    return folder


def tiny_clip_model(folder: Path, side: int = 16) -> Path:
    """A whole CLIP with its processor, in one folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    words = encoder.write_words(folder)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": TOKENS, "eos_token_id": 1, "bos_token_id": 0}
    seen = {**sizes, "image_size": side, "patch_size": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=seen, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)
    return folder


def tiny_t5(folder: Path) -> Path:
    """A T5 encoder with a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {name: number for number, name in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder / "tokenizer"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5EncoderModel(T5Config(vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)).save_pretrained(
            folder / "text_encoder"
        )
    return folder
