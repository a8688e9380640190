"""One use of a command, from what was typed to its exit code: the settings, then the work, here or in several processes."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmpctl.cli.commands import Row
from dmpctl.cli.console import config_report, progress_for, show
from dmpctl.errors import DmpError, Interrupted, UsageError
from dmpctl.files import run_of
from dmpctl.settings.layers import resolve
from dmpctl.settings.model import Settings
from dmpctl.settings.options import options_of


def call(command: Row, given: Mapping[str, object], argument: Any, config: Path | None, state: dict[str, Any]) -> int:
    """Do what one line asks for and print it; returns the exit code.

    `given`: field name -> value of the options that were typed; `argument` None: there is none; `config` None: no file was
    named. `state["debug"]` becomes whether a failure shows its traceback.
    """
    state["debug"] = given.get("debug") is True  # a failure to read the settings has one, too
    argument = _meant(command, argument, "" in state.get("args", ()))
    run = Path(argument).expanduser() if isinstance(argument, str | Path) else None
    resolved = resolve(command.name, given, config, run)
    settings = resolved.settings
    state["debug"] = settings.console.debug
    if settings.console.offline:  # the Hub's libraries read these when they are imported, here and in started processes
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if settings.cache.cache_dir is not None:
        cache = settings.cache.cache_dir.expanduser().absolute()
        hub, datasets = str(cache / "hub"), str(cache / "datasets")
        os.environ.update(DMPCTL_CACHE_DIR=str(cache), HF_HUB_CACHE=hub, HF_DATASETS_CACHE=datasets)
    if settings.console.print_config:
        show(config_report(command.name, resolved), settings.console.json_output)
        return 0
    code = started(command.name, settings, argument)
    return perform(command, settings, argument) if code is None else code


def _meant(command: Row, argument: Any, empty: bool) -> Any:
    """The argument, RUN for a file that lies in a run. `empty`: whether an empty word was typed; UsageError if this is it."""
    if command.argument is None or argument is None:
        return argument
    words = argument if isinstance(argument, list) else [argument]
    if empty and any(word in ("", Path()) for word in words):
        name = command.argument.name.upper()
        raise UsageError(f"{name} is empty", f"say what {name} is: dmpctl {command.name} --help")
    if command.argument.name not in ("run", "what"):
        return argument
    path = Path(words[0]).expanduser()
    words = [words[0] if (run := run_of(path)) == path else str(run) if isinstance(words[0], str) else run, *words[1:]]
    return words if isinstance(argument, list) else words[0]


def started(name: str, settings: Settings, argument: Any) -> int | None:
    """Exit code of the command in processes of its own; None where this process is to do it.

    UsageError for one of several processes of a command that is made for one.
    """
    if "num_processes" not in options_of(name):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(f"dmpctl {name} works in one process, {os.environ['WORLD_SIZE']} were started", "start it by itself")
        return None
    alone = settings.launch.num_processes == 1 and settings.launch.nnodes == "1"
    if settings.console.dry_run or alone:  # needs no torch
        return None
    from dmpctl.processes.launcher import processes_to_start, run_in
    from dmpctl.processes.notes import Assignment

    processes = processes_to_start(settings.launch)
    with requeueing(settings):
        return run_in(processes, Assignment(name, settings, argument, sys.argv)) if processes else None


def perform(command: Row, settings: Settings, argument: Any) -> int:
    """Do the work in this process and print what it found; returns its exit code."""
    from dmpctl.processes.stop import ending_by_signals

    with requeueing(settings), ending_by_signals():
        try:
            report = command.run(settings, argument, progress_for(settings.console))
        except DmpError as error:
            error.hint = own_hint(error.hint, command.name)
            raise
    show(report, settings.console.json_output)
    return report.exit_code


def own_hint(hint: str | None, name: str) -> str | None:
    """Returns a hint without the ways out that name an option of other commands alone: what reads files is shared by many."""
    known = {flag for option in options_of(name).values() for flag in (option.flag, option.off)} | {"--config", "--help"}
    foreign = [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", hint or "") if flag not in known]
    if hint is None or not foreign or "dmpctl " in hint:
        return hint
    ways = [way for way in re.split(r",? or |; |, ", hint) if not any(flag in way for flag in foreign)]
    return ", or ".join(ways) or f"change the files themselves: dmpctl {name} has no {foreign[0]}"


@contextmanager
def requeueing(settings: Settings) -> Iterator[None]:
    """Under --requeue, a stop that asks a scheduler to put the job into its queue again."""
    try:
        yield
    except Interrupted as stop:
        raise stop.requeued() if settings.launch.requeue else stop from None
