"""What comes from elsewhere and goes there: downloads, the cache, other people's files, the Hub."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dmpctl.settings.sections import Flag, Section


class Importing(Section, panel="Import", science=False):
    """`dmpctl import`: what a file of other people does not say of itself."""

    import_run: Annotated[
        Path | None, Field(description="Run directory that is made; default: runs/<name of the file>."), Flag("run")
    ] = None
    import_weights: Annotated[
        Literal["ema", "raw"] | None,
        Field(description="Average of the weights, or the last ones; default: the average where the file has one."),
        Flag("weights"),
    ] = None
    shape: Annotated[
        str | None, Field(description="Published shape that it must be, such as DiT-B/2; default: whatever the tensors show.")
    ] = None
    import_heads: Annotated[
        int | None,
        Field(ge=1, description="Attention heads; default: what the file says, else those of the published shape of its width."),
        Flag("num_heads"),
    ] = None
    import_schedule: Annotated[
        Literal["linear", "cosine", "flow"] | None,
        Field(description="Noise schedule it was trained with (SiT: flow); default: what the file says, else linear."),
        Flag("schedule"),
    ] = None
    import_topk: Annotated[
        int | None, Field(ge=1, description="Prompts that its gate keeps; default: what the file says, else all."), Flag("topk")
    ] = None
    import_position: Annotated[
        Literal["add", "prepend"] | None,
        Field(description="Where its prompts go; default: what the file says, else add if there is one per token."),
        Flag("position"),
    ] = None


class Exporting(Section, panel="Export", science=False):
    """`dmpctl export`: in which form."""

    to: Annotated[
        Literal["patch", "merged", "dmp-pt"],
        Field(description="The patch alone, one file with its backbone, or the published code's checkpoint."),
    ] = "merged"


class Push(Section, panel="Push", science=False):
    """`dmpctl push`: what goes to the Hub."""

    push_backbone: Annotated[
        bool, Field(description="Upload the backbone beside the patch: others have no other."), Flag("with_backbone")
    ] = False
    private: Annotated[bool, Field(description="Make the repository private, if it is made.")] = False


class Cache(Section, panel="Cache", science=False):
    cache_dir: Annotated[
        Path | None, Field(description="Where what was downloaded or computed once is kept; default: $XDG_CACHE_HOME/dmpctl.")
    ] = None


class Download(Section, panel="Download", science=False):
    """`dmpctl download`: what, and what is to be done with it."""

    list_assets: Annotated[
        bool, Field(description="List what there is, its size and licence, and whether it is here."), Flag("list")
    ] = False
    needed_for: Annotated[
        Path | None,
        Field(description="Fetch what an experiment needs: a settings file or a run; default: the assets named."),
        Flag("for"),
    ] = None
    encode_with: Annotated[
        str | None,
        Field(description="Encode the images that are named with this codec: vae-ema, vae-mse or a folder; default: fetch only."),
        Flag("latents"),
    ] = None
    accept_license: Annotated[bool, Field(description="Accept licences that forbid commercial use.")] = False
    verify: Annotated[bool, Field(description="Hash again what is here, or the assets named.")] = False
    prune: Annotated[bool, Field(description="Remove from the cache what no asset names, and what downloads left over.")] = False

    @field_validator("encode_with", mode="before")
    @classmethod
    def _names_a_codec(cls, value: Any) -> Any:
        """`latents` is a switch for patch and pretrain, and a name here: one settings file may hold either at its top."""
        if isinstance(value, bool) or str(value).lower() in ("true", "false", "0", "1", "yes", "no", "on", "off"):
            raise ValueError(
                f"latents of download names a codec (vae-ema, vae-mse or a folder), found {value}; "
                "the switch of patch and pretrain goes into their own tables"
            )
        return value

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        kinds = (("list", self.list_assets), ("verify", self.verify), ("prune", self.prune), ("latents", self.encode_with))
        given = [name for name, on in kinds if on]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two different things, give one of the two")
        return self
