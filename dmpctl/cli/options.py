"""From sections to Typer parameters, and from the parsed line back to settings: nothing about an option is said twice."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from dmpctl.cli.help import WIDTH, Command
from dmpctl.errors import Interrupted, UsageError
from dmpctl.settings.commands import Option, options_of
from dmpctl.types import Progress, Report

if TYPE_CHECKING:
    from dmpctl.settings.model import Settings


@dataclass(frozen=True)
class Argument:
    """The one positional argument of a command. `kind`: Path, str or list[str]; an optional one may be left out."""

    name: str
    kind: Any
    help: str
    optional: bool = False


@dataclass(frozen=True)
class Call:
    """One use of a command. `argument` is the positional one, None if there is none or it was left out."""

    settings: "Settings"
    argument: Any
    progress: Progress


Body = Callable[[Call], Report]


def command(name: str, body: Body, examples: Sequence[str], argument: Argument | None = None) -> typer.Typer:
    """A Typer app that is the command `name`: its help is the docstring of `body`, then the examples."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=Command, epilog="\n".join(examples), context_settings={"max_content_width": WIDTH})(
        callback(name, body, argument)
    )
    return app


def callback(name: str, body: Body, argument: Argument | None) -> Callable[..., None]:
    """The function Typer calls: resolves the settings, then prints them or hands them to `body` and prints its report."""

    def call(ctx: typer.Context, config: Path | None, **parsed: Any) -> None:
        from dmpctl.cli.console import Output, config_report, progress_for
        from dmpctl.settings.layers import resolve

        given = {option: parsed[option] for option in options_of(name) if was_typed(ctx, option)}
        state = ctx.ensure_object(dict)  # what main() knows of a command that fails
        state["debug"] = given.get("debug") is True
        positional = parsed[argument.name] if argument else None
        run = Path(positional).expanduser() if isinstance(positional, str | Path) else None
        resolved = resolve(name, given, config, run)
        console = resolved.settings.console
        state["debug"] = console.debug
        if console.offline:  # the hub library reads it when it is imported
            os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        if resolved.settings.cache.cache_dir is not None:  # for the Hub's libraries, and every process that the command starts
            cache = resolved.settings.cache.cache_dir.expanduser().absolute()
            places = {"HF_HUB_CACHE": str(cache / "hub"), "HF_DATASETS_CACHE": str(cache / "datasets")}
            os.environ.update(DMPCTL_CACHE_DIR=str(cache), **places)
        if console.print_config:
            Output(console.json_output).result(config_report(name, resolved))
            return
        code = started(name, resolved.settings, positional)
        if code is None:
            code = perform(body, Call(resolved.settings, positional, progress_for(console)))
        if code:
            raise typer.Exit(code)

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    positional = [_argument(argument)] if argument else []
    options = [_parameter(option) for option in options_of(name).values()]
    call.__signature__ = inspect.Signature([context, *positional, *options, _config()])  # type: ignore[attr-defined]
    call.__name__, call.__doc__, call.__annotations__ = name, inspect.getdoc(body), {}
    return call


def started(name: str, settings: "Settings", argument: Any) -> int | None:
    """Exit code of the command in processes of its own; None where this process is to do it.

    UsageError for one of several processes of a command that is made for one.
    """
    if "num_processes" not in options_of(name):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(f"dmpctl {name} works in one process, {os.environ['WORLD_SIZE']} were started", "start it by itself")
        return None
    if settings.console.dry_run:
        return None
    if settings.launch.num_processes == 1 and settings.launch.nnodes == "1":  # needs no torch
        return None
    from dmpctl.processes.launcher import processes_to_start, run_in
    from dmpctl.processes.notes import Assignment

    processes = processes_to_start(settings.launch)
    with requeueing(settings):
        return run_in(processes, Assignment(name, settings, argument, sys.argv)) if processes else None


def perform(body: Body, call: Call) -> int:
    """Do the work in this process and print what it found; returns its exit code."""
    from dmpctl.cli.console import Output
    from dmpctl.processes.stop import ending_by_signals

    with requeueing(call.settings), ending_by_signals():
        report = body(call)
    Output(call.settings.console.json_output).result(report)
    return report.exit_code


@contextmanager
def requeueing(settings: "Settings") -> Iterator[None]:
    """Under --requeue, a stop that asks a scheduler to put the job into its queue again."""
    try:
        yield
    except Interrupted as stop:
        raise stop.requeued() if settings.launch.requeue else stop from None


def was_typed(ctx: typer.Context, name: str) -> bool:
    """Whether the option was on the command line; variables and files are read by `layers`."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def verbatim(value: Any) -> Any:
    """What was typed, as it was typed: `layers` validates all values, wherever they come from, in one way."""
    return value


def written(kind: type, field: FieldInfo) -> str:
    """The type as help shows it: `<int 1..1000>`, `<float >0>`, `<path>`; empty for a flag."""
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


def _argument(argument: Argument) -> inspect.Parameter:
    info = typer.Argument(help=argument.help, metavar=argument.name.upper(), show_default=False)
    default = None if argument.optional else inspect.Parameter.empty
    return inspect.Parameter(
        argument.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[argument.kind, info]
    )


def _config() -> inspect.Parameter:
    help_ = "Settings from a TOML file: keys as the options, a table named like the command over them; default: none."
    info = typer.Option("--config", help=help_, rich_help_panel="Console", envvar="DMPCTL_CONFIG", metavar="<path>")
    return inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, info])
