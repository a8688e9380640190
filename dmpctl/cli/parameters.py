"""From a command and its options to what Typer parses: nothing about an option is said twice."""

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo
from typer.main import get_command

from dmpctl.cli.commands import Row
from dmpctl.cli.help import CONTEXT, HelpPage
from dmpctl.cli.unparsed import stray
from dmpctl.settings.options import Option, options_of


def parsed_by_typer(command: Row) -> Any:
    """Returns what parses and does a command; its help is the command's, then the options and the examples."""

    def callback(ctx: typer.Context, config: Path | None, **parsed: Any) -> None:
        from dmpctl.cli.calls import call  # imports rich, which a help page does without

        # what was typed alone: environment variables and files are read by `layers`
        sources = {name: ctx.get_parameter_source(name) for name in options_of(command.name)}
        given = {name: parsed[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
        state = ctx.ensure_object(dict)
        if ctx.args:
            raise stray(command, ctx.args, state.get("args", ()))
        argument = parsed[command.argument.name] if command.argument else None
        if code := call(command, given, argument, config, state):
            raise typer.Exit(code)

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    positional = []
    if (asked := command.argument) is not None:
        kind: Any = Annotated[asked.kind, typer.Argument(help=asked.help, metavar=asked.name.upper(), show_default=False)]
        default = None if asked.optional else inspect.Parameter.empty
        positional = [inspect.Parameter(asked.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)]
    options = [_parameter(option) for option in options_of(command.name).values()]
    text = "Settings from a TOML file: keys as the options, a table named like the command over them; default: none."
    info = typer.Option("--config", help=text, rich_help_panel="Console", envvar="DMPCTL_CONFIG", metavar="<path>")
    config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, info])
    callback.__signature__ = inspect.Signature([context, *positional, *options, config])  # type: ignore[attr-defined]
    callback.__annotations__ = {}
    page, _, examples = inspect.cleandoc(command.page).rpartition("\n\n")
    context_settings = {**CONTEXT, "allow_extra_args": True}
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(command.name, cls=HelpPage, help=page, epilog=examples, context_settings=context_settings)(callback)
    return get_command(app)


def verbatim(value: Any) -> Any:
    """Returns what was typed, as it was typed: `layers` validates all values, wherever they come from, in one way."""
    return value


def written(kind: type, field: FieldInfo) -> str:
    """Returns the type as help shows it: `<int 1..1000>`, `<float >0>`, `<path>`; empty for a flag."""
    if kind is bool:
        return ""
    low, high = (
        next((sign + f"{getattr(mark, name):g}" for mark in field.metadata for name, sign in ends if hasattr(mark, name)), "")
        for ends in ((("ge", ">="), ("gt", ">")), (("le", "<="), ("lt", "<")))
    )
    return f"<{' '.join(part for part in (kind.__name__.lower(), low, high) if part)}>"


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = Literal[option.choices] if option.choices else option.plain_type
    info = typer.Option(
        f"{option.flag}/{option.off}" if kind is bool else option.flag,
        help=option.field.description,
        rich_help_panel=option.panel,
        envvar=option.variable,
        parser=verbatim,
        metavar=None if option.choices else written(kind, option.field),
    )
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=option.field.default, annotation=Annotated[kind | None, info]
    )
