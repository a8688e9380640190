"""`dmpctl`: finds the command that was named and imports only that one; turns every failure into one sentence."""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from dmpctl import __version__
from dmpctl.cli.commands import COMMANDS, ROWS
from dmpctl.cli.help import CONTEXT, styled, write_options
from dmpctl.cli.unparsed import no_command, unparsed
from dmpctl.errors import DmpError, UsageError
from dmpctl.processes.peers import loss
from dmpctl.processes.streams import keep_streams, result_lost
from dmpctl.words import fit_to_show

SIGINT = 130  # exit code: 128 + the signal


class Lazy(TyperGroup):
    """Lists its options and the commands without building them; the one that is used, or completed, is built."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for command in ROWS:
            self.add_command(TyperCommand(command.name, short_help=command.line))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise no_command(args[0])
        name, found, rest = super().resolve_command(ctx, args)
        if name is None or found is None:
            return name, found, rest
        from dmpctl.cli.parameters import parsed_by_typer  # costs pydantic, which the root's help page does without

        return name, parsed_by_typer(COMMANDS[name]), rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_options(self, ctx, formatter)
        with formatter.section(styled("Commands", bold=True)):
            formatter.write_dl([(styled(name, fg="cyan"), command.short_help or "") for name, command in self.commands.items()])


app = typer.Typer(cls=Lazy, rich_markup_mode=None, invoke_without_command=True, context_settings=CONTEXT)


def show_version(wanted: bool) -> None:
    """--version, then stop."""
    if wanted:
        typer.echo(f"dmpctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True)] = False,
) -> None:
    """Make a converged diffusion transformer better without retraining it.

    A patch is a small set of gated prompts, trained on a frozen backbone.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(UsageError.exit_code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: that of this process); returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    state: dict[str, Any] = {"debug": False, "args": args}
    try:
        return _run(args, state) or result_lost()
    except KeyboardInterrupt:
        return SIGINT
    except Exception as error:
        return _said(error, state["debug"], args)


def entry() -> NoReturn:
    """`dmpctl` as a process of its own."""
    keep_streams()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their core to others
    os.environ["PYTHONSAFEPATH"] = "1"  # nor does a process that is started from here take modules from the working directory
    code = main()
    if "RANK" in os.environ:
        end(code)
    sys.exit(code)


def end(code: int) -> NoReturn:
    """End one of several processes at once, after all is said and on disk.

    Threads that a library has forgotten may abort an orderly end of the interpreter, which would be a failure of all.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(args: list[str], state: dict[str, Any]) -> int:
    try:
        code = get_command(app).main(args, prog_name="dmpctl", standalone_mode=False, obj=state)
    except SystemExit as stop:  # completion
        if stop.code is not None and not isinstance(stop.code, int):  # Python means it as a failure's words
            raise DmpError(str(stop.code)) from None
        return stop.code or 0
    return code if isinstance(code, int) else 0


def _said(error: Exception, debug: bool, args: list[str]) -> int:
    """Say what went wrong on stderr, with --debug after the traceback (never with local variables); returns the exit code."""
    error = loss(error) or error
    match error:
        case DmpError():
            message, hint, code = error.message, error.hint, error.exit_code
        case typer.TyperException():
            (message, hint), code = unparsed(error, args), error.exit_code
        case _ if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
            message, code = f"not enough memory: {error}", UsageError.exit_code
            hint = "make less at once: a smaller batch, fewer processes, a smaller model"
        case _:
            message, code = f"internal: {type(error).__name__}: {error}".rstrip(": "), DmpError.exit_code
            hint = None if debug else "this is a bug; run it again with --debug to see where"
    if debug:
        typer.echo(fit_to_show("".join(traceback.format_exception(error))), err=True)
    typer.echo(typer.style("error: ", fg="red", bold=True) + fit_to_show(" ".join(message.split())), err=True)
    if hint:
        typer.echo(f"hint: {fit_to_show(hint)}", err=True)
    return code
