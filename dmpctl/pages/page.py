"""Pieces of an HTML page that stands alone: no script, no font, no address is fetched. Every text is escaped here."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b636b; --line: #d9dde1; --paper: #ffffff; --back: #f5f6f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a0a8b0; --line: #3a4046; --paper: #202428; --back: #15181b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
p { margin: .35rem 0; } .soft { color: var(--soft); } .verdict { font-size: 1.1rem; font-weight: 600; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; background: var(--paper); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; } th { font-weight: 600; color: var(--soft); }
td { overflow-wrap: break-word; min-width: 6.5rem; } td.long { overflow-wrap: anywhere; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: .5rem; }
.grid img { width: 100%; }
img.pixels { image-rendering: pixelated; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem 1rem; margin: 0; background: var(--paper); }
pre { border: 1px solid var(--line); border-radius: .5rem; }
code, pre { font: .9rem/1.45 ui-monospace, monospace; }
details { border: 1px solid var(--line); border-radius: .5rem; background: var(--paper); padding: .6rem .9rem; margin: .6rem 0; }
summary { cursor: pointer; } details .wide { border: 0; }
@media print { body { background: #fff; } main { max-width: none; } figure, table { break-inside: avoid; } }
"""


def page(title: str, parts: Iterable[str]) -> bytes:
    """A whole document in UTF-8."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    ).encode()


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A sentence; `kind`: soft or verdict."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys, which are the columns; a column without a name holds the names of the rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = "".join(f"<tr>{''.join(_cell(column, row.get(column, '')) for column in columns)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(column: str, value: Any) -> str:
    text = escape(str(value))
    return f"<td>{text}</td>" if column else f'<th scope="row">{text}</th>'


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values, one pair on each line."""
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="long">{escape(str(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="wide"><table><tbody>{lines}</tbody></table></div>'


def figure(data: bytes, kind: str, alt: str, caption: str, pixels: bool = False) -> str:
    """A picture inside the page; `kind`: png or svg+xml; `alt`: what it shows, in words; `pixels`: enlarged without blur."""
    address = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    sharp = ' class="pixels"' if pixels else ""
    return f'<figure><img{sharp} src="{address}" alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure>'


def grid(parts: Iterable[str]) -> str:
    """Pieces side by side, as many as there is room for."""
    return f'<div class="grid">{"".join(parts)}</div>'


def command(line: str) -> str:
    """A command to be copied."""
    return f"<pre><code>{escape(line)}</code></pre>"


def hidden(title: str, part: str) -> str:
    """A piece that is shown when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>{part}</details>"


def curve(x: Sequence[float], y: Sequence[float], name: str, log: bool = False) -> bytes:
    """A line as SVG: `name` against the step."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        drawn = Figure(figsize=(4.2, 2.5), layout="constrained")
        axis = drawn.subplots()
        axis.plot(x, y, linewidth=1.3, color="#1f5fa8", marker="o" if len(x) < 3 else None, markersize=3)
        axis.set_xlabel("step")
        axis.set_ylabel(name)
        if log:
            axis.set_yscale("log")
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        buffer = io.BytesIO()
        canvas: Any = FigureCanvasSVG(drawn)
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
