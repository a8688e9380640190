"""Pictures of gates: weight against timestep for each block, and how alike the gates of two timesteps are."""

import io
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dmpctl.gates.figures import Seen, timestep_similarity
from dmpctl.store.cache import cache_dir

COLUMNS = 4  # panels side by side


def heat_map(seen: Sequence[Seen], steps: Sequence[int]) -> bytes:
    """PNG: one panel per site, prompts down, timesteps across, weight in units of 1 / N (1 is uniform)."""
    scaled = [one.gates * one.gates.shape[-1] for one in seen]
    spread = max(0.05, *(float((values - 1).abs().max()) for values in scaled))
    panels = [(values.T, (steps[0], steps[-1], values.shape[-1] - 0.5, -0.5)) for values in scaled]
    return _drawn(seen, panels, (1 - spread, 1 + spread), "prompt", "gate weight (uniform = 1)")


def similarity_map(seen: Sequence[Seen], steps: Sequence[int]) -> bytes:
    """PNG: one panel per site, timesteps down and across, correlation of their gates over the prompts."""
    extent = (steps[0], steps[-1], steps[-1], steps[0])
    return _drawn(seen, [(timestep_similarity(one.gates), extent) for one in seen], (-1, 1), "timestep", "correlation of gates")


def _drawn(
    seen: Sequence[Seen], panels: Sequence[tuple[Tensor, tuple[float, ...]]], limits: tuple[float, float], down: str, label: str
) -> bytes:
    """The panels as one picture with a common scale; timesteps across, `down` down."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # its font list, else written elsewhere in the home
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    alike = len({panel.shape for panel, _ in panels}) == 1
    axes: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=alike)
    for number, axis in enumerate(axes.flat):
        if number >= len(panels):
            axis.set_visible(False)
            continue
        values, extent = panels[number]
        style = {"aspect": "auto", "cmap": "RdBu_r", "interpolation": "nearest"}
        axis.imshow(values.numpy(), extent=extent, vmin=limits[0], vmax=limits[1], **style)
        axis.set_title(f"site {seen[number].block}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("timestep", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel(down, fontsize=8)
    figure.colorbar(axes.flat[0].images[0], ax=axes, label=label)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
