"""HTML pages from the templates beside this file (*.html.j2), and the bytes of matplotlib's figures."""

import base64
import io
import json
import os
from typing import TYPE_CHECKING

from dmpctl.store.cache import cache_dir
from dmpctl.words import redacted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render(template: str, page: object) -> bytes:
    """Returns `template`.html.j2 filled with the attributes of `page`, as UTF-8; every text is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("dmpctl", "pages")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"base64": lambda data: base64.b64encode(data).decode(), "json": json.dumps}
    return redacted(environment.get_template(f"{template}.html.j2").render(page=page)).encode()


def drawing(width: float, height: float) -> "Figure":
    """Returns an empty figure of `width` x `height` inches whose panels and labels keep clear of each other."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # its font list, else written elsewhere in the home
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: "Figure") -> bytes:
    """Returns a figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: "Figure", name: str) -> bytes:
    """Returns a figure as SVG with text as text; `name` makes its ids, so that equal figures give equal bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
