"""Protocols: everything that has to be alike before two published numbers may stand side by side."""

from dataclasses import dataclass
from typing import Literal

Preprocessing = Literal["adm", "pytorch-fid", "clean"]
ExtractorKind = Literal["inception", "dinov2", "pixels"]


@dataclass(frozen=True)
class MetricProtocol:
    """How a number is made. `images`: how many are generated, None: as many as there are.

    `split_size`: images per split of the Inception Score in order, None: ten splits, shuffled. `published`: whose numbers
    are made so. `preprocessing` is Inception's, None for another extractor.
    """

    name: str
    extractor: ExtractorKind
    preprocessing: Preprocessing | None
    images: int | None
    split_size: int | None
    published: str


PROTOCOLS: dict[str, MetricProtocol] = {
    protocol.name: protocol
    for protocol in (
        MetricProtocol("adm", "inception", "adm", 50_000, 5_000, "ADM, DiT, SiT, and DMP on FFHQ and ImageNet"),
        MetricProtocol("pytorch-fid", "inception", "pytorch-fid", 30_000, None, "text-to-image on MS-COCO, DMP's too"),
        MetricProtocol("clean", "inception", "clean", 50_000, None, "papers on GANs that use clean-fid"),
        MetricProtocol("dinov2", "dinov2", None, 50_000, None, "FD-DINOv2 (Stein et al. 2023), EDM2"),
        MetricProtocol("pixels", "pixels", None, None, None, "nobody's: for images too small for a network"),
    )
}
