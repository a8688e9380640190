"""Published shapes by name: DiT-S/2 to SiT-XL/8, and DiT-XL/2-text with attention to captions in every block."""

# name -> (width, blocks, heads); Peebles and Xie 2023, table 1
SHAPES = {"DiT-S": (384, 12, 6), "DiT-B": (768, 12, 12), "DiT-L": (1024, 24, 16), "DiT-XL": (1152, 28, 16)}
FLOWS = {name.replace("DiT", "SiT"): shape for name, shape in SHAPES.items()}  # Ma et al. 2024, table 1
PATCH_SIZES = (2, 4, 8)
SHAPE_NAMES = tuple(f"{shape}/{patch}" for shape in SHAPES | FLOWS for patch in PATCH_SIZES)  # without captions
TEXT = "-text"
LATENTS = "vae-ema"  # the row of the codec that published shapes were trained with


def is_shape(word: str) -> bool:
    """Whether `word` names a published shape, with or without captions."""
    return word.removesuffix(TEXT) in SHAPE_NAMES


def is_flow(name: str) -> bool:
    """Whether a shape's name is that of a SiT."""
    return name.partition("/")[0] in FLOWS
