"""The one settings model. Building it looks at nothing but its arguments: workers rebuild it from config.json."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmpctl.errors import IntegrityError
from dmpctl.refusals import Clash, first_error
from dmpctl.settings.assets import Assets
from dmpctl.settings.exchange import Cache, Download, Exporting, Importing, Push
from dmpctl.settings.measuring import Evaluate, Fid, Gates, Images, Prompting, Result, Sampling
from dmpctl.settings.methods import Dmp, Method
from dmpctl.settings.sections import Base, CodecSection, Console, Data, Launch, Run, Section, Shape, Text
from dmpctl.settings.training import Objective, Pretrain, Save, Train
from dmpctl.words import nearest

# What the settings name, as runs record it beside them.
IDENTITIES = ("backbone_sha256", "data_fingerprint", "codec_fingerprint", "text_fingerprint")


class Settings(BaseModel):
    """Every option of every command, one field per section.

    A section that was passed in (`model_fields_set`) is one that the command has; the others keep their defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    console: Console = Console()
    launch: Launch = Launch()
    run: Run = Run()
    base: Base = Base()
    shape: Shape = Shape()
    data: Data = Data()
    method: Method = Field(default=Dmp(), discriminator="method")
    objective: Objective = Objective()
    train: Train = Train()
    pretrain: Pretrain = Pretrain()
    save: Save = Save()
    sampling: Sampling = Sampling()
    result: Result = Result()
    images: Images = Images()
    evaluate: Evaluate = Evaluate()
    fid: Fid = Fid()
    gates: Gates = Gates()
    cache: Cache = Cache()
    download: Download = Download()
    assets: Assets = Assets()
    importing: Importing = Importing()
    exporting: Exporting = Exporting()
    codec: CodecSection = CodecSection()
    text: Text = Text()
    prompting: Prompting = Prompting()
    push: Push = Push()

    @model_validator(mode="after")
    def _patches_fill_images(self) -> Self:
        size, patch_size = self.data.size, self.shape.patch_size
        if "shape" in self.model_fields_set and size is not None and size % patch_size:
            fits = max(patch_size, size - size % patch_size)
            hint = f"say {{size:{fits}}}, or another patch size"
            raise Clash({"size": size, "patch_size": patch_size}, "{size} is not a multiple of {patch_size}", hint)
        return self

    @model_validator(mode="after")
    def _changes_exist(self) -> Self:
        known = {*self.science(), *IDENTITIES} if self.run.allowed else set()
        for name in (name for name in self.run.allowed if name not in known):
            near = nearest(name, known) or "ema"
            raise Clash({"allow_change": name}, "{allow_change} is no setting of an experiment", f"say {{allow_change:{near}}}")
        return self

    @classmethod
    def from_dict(cls, sections: Mapping[str, object]) -> Self:
        """The settings that `to_dict` wrote; IntegrityError if they do not fit this version."""
        try:
            return cls.model_validate(sections)
        except ValidationError as error:
            raise IntegrityError(f"recorded settings do not fit this dmpctl: {first_error(error, cls).sentence}") from None

    def to_dict(self) -> dict[str, Any]:
        """The sections that were passed in with all their values, JSON-able; `from_dict` gives the same settings back."""
        return self.model_dump(mode="json", include=set(self.model_fields_set))

    def science(self) -> dict[str, Any]:
        """JSON-able flat values that make a run this experiment and no other, from the sections that were passed in."""
        flat: dict[str, Any] = {}
        for name, values in self.to_dict().items():
            section: Section = getattr(self, name)
            if section.science:
                flat |= {key: value for key, value in values.items() if key not in section.free}
        return flat
