"""Help pages: plain text in titled sections, so that no name is ever cut off and a pipe reads as well as a screen."""

import os
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

WIDTH = 100
CONTEXT: dict[str, Any] = {"max_content_width": WIDTH, "help_option_names": ["-h", "--help"]}


def styled(text: str, **style: Any) -> str:
    """Colour on a terminal: typer.echo takes it away in a pipe, NO_COLOR keeps it away."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)


def write_options(command: TyperCommand | TyperGroup, ctx: Any, formatter: Any) -> None:
    """One section per panel, in the order in which the panels first appear."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None:
            title = "Arguments" if param.param_type_name == "argument" else getattr(param, "rich_help_panel", None) or "Options"
            panels.setdefault(title, []).append((styled(record[0], fg="cyan"), record[1]))
    for title, records in panels.items():
        with formatter.section(styled(title, bold=True)):
            formatter.write_dl(records, col_max=min(30, formatter.width // 3))


class HelpPage(TyperCommand):
    """A command; its epilog is a list of examples, one per line."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section(styled("Examples", bold=True)):
                formatter.write_text("\b\n" + self.epilog)
