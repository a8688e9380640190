"""Pictures of gates: weight against timestep for each block, and how alike the gates of two timesteps are."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dmpctl.gates.figures import GatesSeen, timestep_similarity
from dmpctl.pages.page import drawing, to_png

COLUMNS = 4  # panels side by side


Panel = tuple[Tensor, tuple[float, float, float, float]]  # values, and where their left, right, bottom and top lie


def heat_map(seen: GatesSeen) -> bytes:
    """Returns a PNG: one panel per site, prompts down, timesteps across, weight in units of 1 / N (1 is uniform)."""
    first, last = seen.timesteps[0], seen.timesteps[-1]
    scaled = [(one.gates * one.gates.shape[-1]).T for one in seen.blocks]
    spread = max(0.05, *(float((values - 1).abs().max()) for values in scaled))
    panels = [(values, (first, last, len(values) - 0.5, -0.5)) for values in scaled]
    return _drawn(seen, panels, (1 - spread, 1 + spread), "prompt", "gate weight (uniform = 1)")


def similarity_map(seen: GatesSeen) -> bytes:
    """Returns a PNG: one panel per site, timesteps down and across, correlation of their gates over the prompts."""
    first, last = seen.timesteps[0], seen.timesteps[-1]
    panels = [(timestep_similarity(one.gates), (first, last, last, first)) for one in seen.blocks]
    return _drawn(seen, panels, (-1, 1), "timestep", "correlation of gates")


def _drawn(seen: GatesSeen, panels: Sequence[Panel], limits: tuple[float, float], down: str, label: str) -> bytes:
    """The panels as one picture with a common scale; timesteps across, `down` down."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = drawing(3.2 * columns + 0.8, 2.6 * rows + 0.4)
    alike = len({values.shape for values, _ in panels}) == 1
    axes: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=alike)
    style: Any = {"aspect": "auto", "cmap": "RdBu_r", "interpolation": "nearest", "vmin": limits[0], "vmax": limits[1]}
    for axis, one, (values, extent) in zip(axes.flat, seen.blocks, panels, strict=False):
        axis.imshow(values.numpy(), extent=extent, **style)
        axis.set_title(f"site {one.block}", fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("timestep", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel(down, fontsize=8)
    figure.colorbar(axes.flat[0].images[0], ax=axes, label=label)
    return to_png(figure)
