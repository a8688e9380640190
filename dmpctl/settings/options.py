"""Which options each command shows, and the names that users write for them."""

from dataclasses import dataclass, replace
from functools import cache
from types import NoneType
from typing import Any, get_args

from pydantic.fields import FieldInfo

from dmpctl.refusals import Form, Writable
from dmpctl.settings.exchange import Cache, Download, Exporting, Importing, Push
from dmpctl.settings.measuring import Evaluate, Fid, Gates, Images, Prompting, Result, Sampling
from dmpctl.settings.methods import METHODS
from dmpctl.settings.sections import Base, CodecSection, Console, Data, Flag, Launch, Run, Section, Shape, Text, choices_of
from dmpctl.settings.training import Objective, Pretrain, Save, Train

VARIABLE_PREFIX = "DMPCTL_"


@dataclass(frozen=True)
class Part:
    """A section as one command shows it. `only`: these fields, empty for all; `panel`: None for the section's own."""

    section: type[Section]
    only: tuple[str, ...] = ()
    panel: str | None = None


@dataclass(frozen=True)
class Option:
    """One option. `name` is its field; `public` is what users write: --batch-size, DMPCTL_BATCH_SIZE, batch_size in TOML.

    `choices` is empty where any value of the type will do.
    """

    name: str
    public: str
    field: FieldInfo
    section: type[Section]
    panel: str
    choices: tuple[Any, ...]

    @property
    def flag(self) -> str:
        return "--" + self.public.replace("_", "-")

    @property
    def off(self) -> str:
        """The flag that says no, for a yes-or-no option."""
        return "--no-" + self.public.replace("_", "-")

    @property
    def variable(self) -> str:
        return VARIABLE_PREFIX + self.public.upper()

    @property
    def written(self) -> Writable:
        """The option as messages write it."""
        return Writable(self.public, self.flag, self.off if self.plain_type is bool else "", self.variable)

    def form(self, where: str) -> Form:
        """How a user gave it, by where it was found; plain for a value that no user gave."""
        forms: dict[str, Form] = {self.flag: "flag", self.off: "flag", self.variable: "variable", self.public: "argument"}
        return forms.get(where, "key" if where.replace("-", "_").endswith(f": {self.public}") else "plain")

    @property
    def plain_type(self) -> Any:
        """The type of a value that was given: X of X | None."""
        annotation: Any = self.field.annotation
        rest = [part for part in get_args(annotation) if part is not NoneType]
        return rest[0] if NoneType in get_args(annotation) and len(rest) == 1 else annotation


def _parts(*sections: type[Section]) -> tuple[Part, ...]:
    return tuple(Part(section) for section in sections)


COLUMNS = ("image_column", "label_column", "caption_column")
IMAGES = Part(Data, ("size", "hflip", "on_bad", "num_workers", *COLUMNS, "follow_links"), "Latents")
DEVICE = Part(Launch, ("device", "cpu"))
DECODER = Part(CodecSection, ("codec", "codec_batch"))
PROMPTS = (Part(Prompting), Part(Text, ("text_encoder", "text_tokens", "text_batch")), Part(Data, ("follow_links",), "Text"))

# In the order of `dmpctl --help`; the parts in the order of each command's own help.
COMMANDS: dict[str, tuple[Part, ...]] = {
    "download": (Part(Download), IMAGES, Part(CodecSection, ("codec_batch",)), DEVICE, *_parts(Cache, Console)),
    "pretrain": _parts(Shape, Data, CodecSection, Text, Objective, Train, Pretrain, Run, Save, Launch, Cache, Console),
    "patch": (
        *_parts(Base, Data, CodecSection, Text, *METHODS.values(), Objective, Train, Run, Save),
        *_parts(Evaluate, Sampling, Launch, Cache, Console),
    ),
    "sample": (*_parts(Images, Sampling), *PROMPTS, DECODER, *_parts(Result, Launch, Cache, Console)),
    "fid": (
        Part(Fid),
        Part(Data, ("on_bad", "follow_links"), "Distance"),
        Part(Sampling),
        *PROMPTS,
        DECODER,
        *_parts(Result, Launch, Cache, Console),
    ),
    "compare": (Part(Launch, ("device", "cpu", "deterministic", "requeue")), Part(Console)),
    "inspect-gates": (
        Part(Gates),
        Part(Images, ("image_label", "out"), "Gates"),
        *PROMPTS,
        DECODER,
        DEVICE,
        *_parts(Result, Cache, Console),
    ),
    "report": (Part(Images, ("out",), "Report"), Part(Gates, ("timesteps",)), *PROMPTS, DEVICE, *_parts(Cache, Console)),
    "push": _parts(Push, Cache, Console),
    "import": (Part(Importing), Part(Data, ("data",), "Import"), Part(Console)),
    "export": (Part(Exporting), Part(Images, ("out",), "Export"), *_parts(Result, Console)),
    "doctor": _parts(Console),
}


@cache
def options_of(command: str) -> dict[str, Option]:
    """The options that `command` shows, by field name, in the order of its help.

    A name that several methods share offers the choices of all of them.
    """
    options: dict[str, Option] = {}
    for part in COMMANDS[command]:
        for name, field in part.section.model_fields.items():
            if part.only and name not in part.only:
                continue
            public = next((mark.name for mark in field.metadata if isinstance(mark, Flag)), name)
            panel = part.panel or part.section.panel
            option = Option(name, public, field, part.section, panel, choices_of(field.annotation))
            if name in options:
                more = (choice for choice in option.choices if choice not in options[name].choices)
                option = replace(options[name], choices=(*options[name].choices, *more))
            options[name] = option
    return options


def defaults_of(command: str) -> dict[str, Any]:
    """Returns the value of each option of `command` where nothing gives another."""
    return {name: option.field.default for name, option in options_of(command).items()}


def field_of(section: type[Section]) -> str:
    """The field of Settings that holds a section; all methods share one."""
    return "method" if section in METHODS.values() else section.__name__.removesuffix("Section").lower()


@cache
def every_option() -> dict[str, Option]:
    """The options of all commands, by the name that users write."""
    return {option.public: option for command in COMMANDS for option in options_of(command).values()}
