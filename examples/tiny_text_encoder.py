"""Write a text encoder that needs no download: CLIP's network with random weights, whose words are single letters.

  python examples/tiny_text_encoder.py encoders/letters

States of different captions differ, which is all that a small experiment needs; they mean nothing. OUT gets text_encoder/ and
tokenizer/ in the files of transformers, the same bytes every time.
"""

import argparse
import json
from pathlib import Path

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
TOKENS = 77


def write_words(folder: Path) -> dict[str, int]:
    """The files of a CLIP tokenizer of letters; returns its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    words = {name: number for number, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "pad_token": "<|endoftext|>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return words


def write_encoder(folder: Path, seed: int = 0, width: int = 32) -> Path:
    """The encoder and its tokenizer; random weights that depend on `seed` and `width` alone."""
    from transformers import CLIPTextConfig, CLIPTextModel

    words = write_words(folder / "tokenizer")
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=TOKENS, eos_token_id=1, bos_token_id=0, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    write_encoder(parser.parse_args().out)
