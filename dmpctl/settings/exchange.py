"""Exchange with the world outside: downloads, the cache, other people's files, the Hub."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dmpctl.refusals import Clash
from dmpctl.settings.sections import Flag, Section


class Importing(Section, panel="Import", science=False):
    """`dmpctl import`: what a file of other people does not say of itself."""

    import_run: Annotated[Path | None, Flag("run")] = Field(
        default=None, description="Run directory to make; default: runs/<name of the file>."
    )
    import_weights: Annotated[Literal["ema", "raw"] | None, Flag("weights")] = Field(
        default=None, description="Average of the weights, or the last ones; default: the average where the file has one."
    )
    shape: str | None = Field(
        default=None, description="Published shape that the file must have, such as DiT-B/2; default: read from the tensors."
    )
    import_heads: Annotated[int | None, Flag("num_heads")] = Field(
        default=None,
        ge=1,
        description="Attention heads; default: what the file says, else those of the published shape of its width.",
    )
    import_schedule: Annotated[Literal["linear", "cosine", "flow"] | None, Flag("schedule")] = Field(
        default=None, description="Noise schedule it was trained with (SiT: flow); default: what the file says, else linear."
    )
    import_topk: Annotated[int | None, Flag("topk")] = Field(
        default=None, ge=1, description="Prompts that its gate keeps; default: what the file says, else all."
    )
    import_position: Annotated[Literal["add", "prepend"] | None, Flag("position")] = Field(
        default=None, description="Where its prompts go; default: what the file says, else add if there is one per token."
    )


class Exporting(Section, panel="Export", science=False):
    """`dmpctl export`: in which form."""

    to: Literal["patch", "merged", "dmp-pt"] = Field(
        default="merged", description="The patch alone, one file with its backbone, or the published code's checkpoint."
    )


class Push(Section, panel="Push", science=False):
    """`dmpctl push`: what goes to the Hub."""

    push_backbone: Annotated[bool, Flag("with_backbone")] = Field(
        default=False, description="Also upload the backbone, where others cannot get it elsewhere."
    )
    private: bool = Field(default=False, description="Make the repository private if it is new.")


class Cache(Section, panel="Cache", science=False):
    cache_dir: Path | None = Field(
        default=None, description="Folder for downloads and cached results; default: $XDG_CACHE_HOME/dmpctl."
    )


class Download(Section, panel="Download", science=False):
    """`dmpctl download`: what, and what is to be done with it."""

    list_assets: Annotated[bool, Flag("list")] = Field(
        default=False, description="List what there is, its size and licence, and whether it is here."
    )
    needed_for: Annotated[Path | None, Flag("for")] = Field(
        default=None, description="Fetch what an experiment needs: a settings file or a run; default: the assets named."
    )
    encode_with: Annotated[str | None, Flag("latents")] = Field(
        default=None,
        description="Encode the images that are named with this codec: vae-ema, vae-mse or a folder; default: fetch only.",
    )
    accept_license: bool = Field(default=False, description="Accept licences that forbid commercial use.")
    verify: bool = Field(default=False, description="Check the hashes of what is here, or of the assets named.")
    prune: bool = Field(
        default=False, description="Remove files that no asset names, and what downloads left over, from the cache."
    )

    @field_validator("encode_with", mode="before")
    @classmethod
    def _names_a_codec(cls, value: Any) -> Any:
        """`latents` is a switch for patch and pretrain, and a name here: one settings file may hold either at its top."""
        if isinstance(value, bool) or str(value).lower() in ("true", "false", "0", "1", "yes", "no", "on", "off"):
            raise Clash(
                {"encode_with": value},
                "{encode_with} names no codec: the switch of that name belongs to patch and pretrain",
                "say {encode_with:vae-ema}; the switch goes into the tables [patch] and [pretrain]",
            )
        return value

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        given = [name for name in ("list_assets", "verify", "prune", "encode_with") if getattr(self, name)]
        if len(given) > 1:
            first, second = given[:2]
            hint = f"leave {{{first}:-}} or {{{second}:-}} out"
            raise Clash(self, f"{{{first}}} and {{{second}}} are two different things", hint)
        return self
