"""What `dmpctl download` knows by name: the published weights, data and statistics that the experiments use.

A hash or size that is not given here was not known when the row was written: it is recorded at the first download, and
checked after. Rows of the settings file ([assets.NAME]) come before those of the same name here.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from dmpctl.errors import UsageError
from dmpctl.settings.assets import AssetRow
from dmpctl.settings.model import Settings

DIT = "https://dl.fbaipublicfiles.com/DiT/models/"
FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
COCO = "https://s3.amazonaws.com/images.cocodataset.org/"  # images.cocodataset.org itself has no https
NC = "CC-BY-NC-4.0"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINE = ("model_index.json", "scheduler/*.json", "transformer/config.json", f"transformer/{WEIGHTS}")
SHARDS = ("*.parquet", "README.md")
DIFFERS = "diffusers embeds time with another frequency shift: not the same function as the original"

BACKBONES = (
    AssetRow(
        name="dit-xl2-256",
        what="DiT-XL/2, ImageNet 256, original",
        url=DIT + "DiT-XL-2-256x256.pt",
        licence=NC,
        non_commercial=True,
        needs=("vae-ema",),
        score="FID 2.27 at cfg 1.5",
        notes="bare state dict of the average",
    ),
    AssetRow(
        name="dit-xl2-512",
        what="DiT-XL/2, ImageNet 512, original",
        url=DIT + "DiT-XL-2-512x512.pt",
        licence=NC,
        non_commercial=True,
        needs=("vae-ema",),
        score="FID 3.04",
        notes="bare state dict of the average",
    ),
    AssetRow(
        name="dit-xl2-256-diffusers",
        what="DiT-XL/2, ImageNet 256, diffusers",
        repo="facebook/DiT-XL-2-256",
        revision="32d0e3550d47bdf75c5092db378c0f32cd12e100",  # refs/pr/1: main has pickles only
        allow=PIPELINE,
        licence=NC,
        non_commercial=True,
        needs=("vae-ema",),
        notes=DIFFERS,
    ),
    AssetRow(
        name="dit-xl2-512-diffusers",
        what="DiT-XL/2, ImageNet 512, diffusers",
        repo="facebook/DiT-XL-2-512",
        allow=("model_index.json", "scheduler/*.json", "transformer/config.json", "transformer/diffusion_pytorch_model.*"),
        licence=NC,
        non_commercial=True,
        needs=("vae-ema",),
        notes=f"main holds a pickle, read as plain tensors; {DIFFERS}",
    ),
    AssetRow(
        name="sd15",
        what="Stable Diffusion 1.5",
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        allow=(
            *(
                "model_index.json",
                "scheduler/*.json",
                "tokenizer/*",
                "text_encoder/config.json",
                "text_encoder/model.safetensors",
            ),
            *("unet/config.json", f"unet/{WEIGHTS}", "vae/config.json", f"vae/{WEIGHTS}"),
        ),
        licence="CreativeML OpenRAIL-M",
        notes="the runwayml id is gone",
    ),
    AssetRow(
        name="pixart-256",
        what="PixArt-alpha XL/2, text to image 256",
        repo="PixArt-alpha/PixArt-XL-2-256x256",
        allow=("transformer/config.json", f"transformer/{WEIGHTS}"),
        about=2_440_000_000,
        licence="OpenRAIL++",
        needs=("pixart-t5", "vae-ema"),
    ),
    AssetRow(
        name="clip-l",
        what="CLIP ViT-L/14: text encoder, and CLIP score",
        kind="text",
        repo="openai/clip-vit-large-patch14",
        allow=("*.json", "merges.txt", "model.safetensors"),
        about=1_710_000_000,
        licence="MIT",
        notes="the text encoder of Stable Diffusion 1.5 is its text half",
    ),
    AssetRow(
        name="pixart-t5",
        what="T5 text encoder of PixArt-alpha",
        kind="text",
        repo="PixArt-alpha/PixArt-XL-2-512x512",
        allow=(
            "tokenizer/*",
            "text_encoder/config.json",
            "text_encoder/model-*.safetensors",
            "text_encoder/model.safetensors.index.json",
        ),
        about=19_050_000_000,
        licence="OpenRAIL++",
        notes="captions are encoded once and cached",
    ),
)

CODECS = (
    AssetRow(
        name="vae-ema",
        what="SD VAE, ema: DiT was trained with it",
        kind="codec",
        repo="stabilityai/sd-vae-ft-ema",
        file=WEIGHTS,
        allow=("config.json",),
        about=334_643_276,
        licence="MIT",
    ),
    AssetRow(
        name="vae-mse",
        what="SD VAE, mse: published DiT tables decode with it",
        kind="codec",
        repo="stabilityai/sd-vae-ft-mse",
        revision="31f26fdeee1355a5c34592e401dd41e45d25a493",
        file=WEIGHTS,
        allow=("config.json",),
        sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        size=334_643_276,
        licence="MIT",
    ),
)

DATA = (
    AssetRow(
        name="ffhq",
        what="FFHQ 256: 70 000 faces",
        kind="data",
        repo="bitmind/ffhq-256",
        dataset=True,
        allow=SHARDS,
        about=7_630_000_000,
        licence="CC-BY-NC-SA-4.0",
        non_commercial=True,
        alternative="--data hf://datasets/merkol/ffhq-256",
        notes="column image",
    ),
    AssetRow(
        name="imagenet",
        what="ImageNet-1k",
        kind="data",
        repo="ILSVRC/imagenet-1k",
        dataset=True,
        allow=SHARDS,
        licence="ImageNet terms of access",
        non_commercial=True,
        gated=True,
        alternative="a folder of your own, --data DIR",
        notes="gated; class index = sorted synset order",
    ),
    AssetRow(
        name="coco",
        what="MS-COCO 2014: images and captions",
        kind="data",
        parts=("coco-train2014", "coco-val2014", "coco-annotations"),
        about=20_408_459_804,
        licence="CC-BY-4.0 (annotations), Flickr terms (images)",
        notes="82 783 train, 40 504 val, 5 captions each",
    ),
    AssetRow(
        name="coco-train2014",
        what="MS-COCO 2014: train images",
        kind="data",
        url=COCO + "zips/train2014.zip",
        sha256="ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
        size=13_510_573_713,
        licence="Flickr terms of use",
    ),
    AssetRow(
        name="coco-val2014",
        what="MS-COCO 2014: val images",
        kind="data",
        url=COCO + "zips/val2014.zip",
        sha256="fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
        size=6_645_013_297,
        licence="Flickr terms of use",
    ),
    AssetRow(
        name="coco-annotations",
        what="MS-COCO 2014: captions",
        kind="data",
        url=COCO + "annotations/annotations_trainval2014.zip",
        sha256="031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
        size=252_872_794,
        licence="CC-BY-4.0",
    ),
    AssetRow(
        name="coco-val30k",
        what="MS-COCO 2014: 30 000 val images with one caption",
        kind="data",
        repo="sayakpaul/coco-30-val-2014",
        dataset=True,
        allow=SHARDS,
        licence="CC-BY-4.0 (annotations), Flickr terms (images)",
        alternative="coco-val2014 and coco-annotations",
        notes="columns image, caption",
    ),
    AssetRow(
        name="coco-karpathy",
        what="MS-COCO 2014: captions in Karpathy's split",
        kind="data",
        repo="yerevann/coco-karpathy",
        dataset=True,
        allow=SHARDS,
        about=25_500_000,
        licence="CC-BY-4.0",
        alternative="coco-annotations",
    ),
    AssetRow(
        name="laion-art",
        what="LAION-Art, 20 927 images with text",
        kind="data",
        repo="fantasyfish/laion-art",
        dataset=True,
        allow=SHARDS,
        alternative="laion-subset, or a data set of your own, --data hf://datasets/OWNER/NAME",
        notes="columns image, text; licence of each image unknown",
    ),
    AssetRow(
        name="laion-subset",
        what="LAION, 1 070 images with text",
        kind="data",
        repo="nannullna/laion_subset",
        dataset=True,
        allow=SHARDS,
        alternative="laion-art, or a data set of your own, --data hf://datasets/OWNER/NAME",
        notes="licence of each image unknown",
    ),
)

EXTRACTORS = (
    AssetRow(
        name="inception",
        what="Inception-v3 for FID",
        kind="extractor",
        url=FIDELITY + "weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
        licence="Apache-2.0",
    ),
    AssetRow(
        name="dinov2",
        what="DINOv2 ViT-L/14 for FD-DINOv2",
        kind="extractor",
        repo="timm/vit_large_patch14_dinov2.lvd142m",
        file="model.safetensors",
        licence="Apache-2.0",
    ),
)

STATISTICS = (
    AssetRow(
        name="adm-imagenet-256",
        what="ADM reference batch, ImageNet 256",
        kind="statistics",
        url=ADM + "256/VIRTUAL_imagenet256_labeled.npz",
        licence="MIT",
        score="ADM's own samples: FID 3.9426, IS 215.84, sFID 6.1404, P 0.8265, R 0.5309",
    ),
    AssetRow(
        name="adm-imagenet-512",
        what="ADM reference batch, ImageNet 512",
        kind="statistics",
        url=ADM + "512/VIRTUAL_imagenet512.npz",
        licence="MIT",
    ),
    AssetRow(
        name="fid-stats-coco",
        what="FID statistics of COCO val 256, as U-ViT",
        kind="statistics",
        file="fid_stats_mscoco256_val.npz",
        notes="published in a shared drive only: put the file there by hand",
    ),
)

SHIPPED: dict[str, AssetRow] = {row.name: row for row in (*BACKBONES, *CODECS, *DATA, *EXTRACTORS, *STATISTICS)}
Registry = Mapping[str, AssetRow]


def registry_of(settings: Settings | None = None) -> dict[str, AssetRow]:
    """All rows by name: the user's own, then the shipped ones whose name they leave free. None: the shipped ones."""
    own = {row.name: row for row in settings.assets.rows} if settings is not None else {}
    rows = own | {name: row for name, row in SHIPPED.items() if name not in own}
    for row in own.values():
        for name in (*row.parts, *row.needs):
            if name not in rows:
                raise UsageError(f"[assets.{row.name}] names {name}, which is no asset", "give it a table of its own")
    return rows


def replaced(settings: Settings) -> list[str]:
    """Names of shipped rows that the user's own take the place of."""
    return [row.name for row in settings.assets.rows if row.name in SHIPPED]


def row_named(name: str, rows: Registry) -> AssetRow:
    """The row of that name; UsageError with the nearest one where there is none."""
    if name in rows:
        return rows[name]
    near = get_close_matches(name, rows, 1)
    raise UsageError(
        f"{name} is no known download", f"did you mean {near[0]}?" if near else "dmpctl download --list shows what there is"
    )


def expanded(names: Iterable[str], rows: Registry) -> list[AssetRow]:
    """The rows to fetch for these names, each once: a row of parts stands for its parts."""
    found: dict[str, AssetRow] = {}
    for name in names:
        row = row_named(name, rows)
        for part in expanded(row.parts, rows) if row.parts else [row]:
            found[part.name] = part
    return list(found.values())
