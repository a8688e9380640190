"""Lines that cannot be parsed, each as one sentence and what to type instead."""

from collections.abc import Sequence
from shlex import quote
from typing import Any

from dmpctl.cli.commands import COMMANDS, Row
from dmpctl.errors import UsageError
from dmpctl.words import nearest_or

INSTEAD = {
    ("", "v"): "dmpctl --version shows the version",
    ("fid", "size"): "leave it out: --protocol says how images are resized",
    **{(name, "version"): "dmpctl --version shows the version" for name in COMMANDS},
    **{(name, "resume"): "leave it out: the same command goes on where it stopped" for name in COMMANDS},
}


def no_command(word: str) -> UsageError:
    """A first word that is no command."""
    from dmpctl.refusals import synonyms  # costs pydantic

    known = nearest_or(word, COMMANDS, "dmpctl --help lists the commands")
    if word == "version":
        known = "dmpctl --version shows the version"
    elif word == "help":
        known = "dmpctl --help, or dmpctl patch --help"
    elif word in synonyms("commands"):
        known = f"did you mean dmpctl {synonyms('commands')[word]}?"
    return UsageError(f"there is no command {word}", known)


def stray(command: Row, words: Sequence[str], args: Sequence[str]) -> UsageError:
    """Words that stand where the command takes none. `args`: the whole line."""
    from dmpctl.refusals import instead, one_of, synonyms, takes

    options, name = _options(command.name), command.name
    word, place = quote(words[0]), args.index(words[0]) if words[0] in args else 0
    flags = {option.flag: option for option in options.values()}
    switch, taker = flags.get(args[place - 1]), flags.get(args[place - 2])
    if switch is not None and switch.plain_type is bool:
        return UsageError(f"{switch.flag} takes no value, found {word}", f"say {switch.flag} or {switch.off}")
    if switch is not None and taker is not None:  # which took the name of the next option for its value
        value = instead(taker.field, "")
        hint = f"say {taker.written.typed('...' if value is None else value, 'flag')} before {switch.flag}"
        return UsageError(f"{taker.flag} takes {takes(taker.field)}, found {switch.flag!r}", hint)
    meant = [f"{flags[flag].flag} {word}" for each in synonyms("stray").get(name, ()) if (flag := f"--{each}") in flags]
    has = f"takes one argument, {command.argument.name.upper()}, found also" if command.argument else "takes no argument, found"
    return UsageError(f"dmpctl {name} {has} {word}", f"say {one_of(meant)}" if meant else f"leave {word} out")


def _options(name: str) -> dict[str, Any]:
    from dmpctl.settings.options import options_of

    return {option.public: option for option in options_of(name).values()}


def unparsed(error: Any, args: Sequence[str]) -> tuple[str, str | None]:
    """Sentence and hint for what Typer could not parse. `args`: the whole line."""
    from dmpctl.refusals import Writable, instead, meant, one_of, takes

    ctx, typed = getattr(error, "ctx", None), str(getattr(error, "option_name", ""))
    name = next((word for word in args if word in COMMANDS), "")
    plain = typed.lstrip("-").replace("-", "_").lower()
    if ctx is not None and ctx.parent is None:
        follow = f"options follow the command: dmpctl {name} {typed}" if name else "dmpctl --help lists the commands"
        hint = nearest_or(typed, ["--help", "--version"], follow, 0.8)
        return f"dmpctl has no option {typed} before the command", INSTEAD.get(("", plain), hint)
    options = _options(name)
    if hasattr(error, "possibilities"):
        typed = typed if typed.startswith("--") else next((word for word in args if word.startswith(typed)), typed)
        having = [each for each in COMMANDS if plain in _options(each)]
        elsewhere = f" ({one_of(having)} {'has' if len(having) == 1 else 'have'} one)" if having else ""
        known = {each: Writable(each, f"--{each}", "", "") for each in ("config", "help")}
        known |= {public: option.written for public, option in options.items()}
        hint = meant(typed, known, "flag", f"dmpctl {name} --help lists its options")
        return f"dmpctl {name} has no option {typed}{elsewhere}", INSTEAD.get((name, plain), hint)
    option = next((option for option in options.values() if typed in (option.flag, option.off)), None)
    if option is not None and option.plain_type is bool:
        return f"{typed} takes no value", f"say {option.flag} or {option.off}"
    if typed:
        value = None if option is None else instead(option.field, "")
        what = "a path" if option is None else one_of(list(map(str, option.choices))) or takes(option.field)
        better = f"leave {typed} out" if value is None or option is None else f"say {option.written.typed(value, 'flag')}"
        return f"{typed} takes {what}, nothing follows it", better
    if (argument := COMMANDS[name].argument) is not None and hasattr(error, "param_type"):
        example = COMMANDS[name].page.rstrip().rpartition("\n\n")[2].splitlines()[0].strip()
        return f"dmpctl {name} needs {argument.name.upper()}: {argument.help}".rstrip("."), f"such as: {example}"
    return error.format_message().replace("\n", " ").rstrip("."), f"dmpctl {name} --help lists what there is"
