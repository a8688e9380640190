"""Every command of `dmpctl`, one row each: its help, its examples, its argument and the function that does it.

The function is imported only when the command runs, so that help stays quick. A new command is one row here and one row in
`settings.options`, which says what options it has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
class Row:
    """A command. `page`: its help page, whose first line stands in the list of commands and whose end are examples.

    `does`: MODULE:FUNCTION below dmpctl. It takes the settings, the argument where there is one, and the progress, and
    returns a Report.
    """

    name: str
    does: str
    page: str
    argument: Argument | None = None

    @property
    def line(self) -> str:
        """The first line of the help page: what the command does."""
        return self.page.partition("\n")[0]

    def run(self, settings: "Settings", argument: Any, progress: Progress) -> Report:
        """Do the command's work. `argument`: the positional one, None if there is none or it was left out."""
        module, _, name = self.does.partition(":")
        function: Callable[..., Report] = getattr(import_module(f"dmpctl.{module}"), name)
        return function(settings, *([argument] if self.argument else []), progress)


def download(settings: "Settings", names: list[str] | None, progress: Progress) -> Report:
    """Fetch assets; with --latents, encode images with one of them, too."""
    if settings.download.encode_with is not None:
        from dmpctl.models.encode_ahead import encode_ahead

        return encode_ahead(settings, names or [], progress)
    from dmpctl.store.download import download as fetch

    return fetch(settings, names or [], progress)


RUN = Argument("run", Path, "Run (or checkpoint) with the patch.")

# In the order of `dmpctl --help`.
ROWS = (
    Row(
        "download",
        "cli.commands:download",
        """Fetch assets into the cache, each checked against its sha256.

        Without a name, lists the assets, their licences, and which are in the cache. With --latents, also encodes the images
        that you name, which patch and pretrain would otherwise do when they start.

        dmpctl download --list
        dmpctl download inception vae-ema
        dmpctl download dit-xl2-256 --accept-license
        dmpctl download ffhq --accept-license --latents vae-ema --size 256
        dmpctl download --for experiment.toml
        dmpctl download --verify
        dmpctl download --prune --dry-run
        """,
        Argument("names", list[str], "Assets to fetch, with --latents also folders and hf://OWNER/NAME; none: list them.", True),
    ),
    Row(
        "pretrain",
        "training.pretrain:pretrain",
        """Train a backbone from scratch.

        For data that has no public backbone. Give the same command again to resume an interrupted run.

        dmpctl pretrain --data digits --hidden-size 32 --depth 4 --num-heads 4
        dmpctl pretrain --data photos/ --size 64 --iters 100000 --ema 0.9999
        """,
    ),
    Row(
        "patch",
        "training.patch:patch",
        """Train a patch on a frozen backbone.

        Without options: the bundled digits backbone, on a CPU, without a network. Give the same command
        again to resume an interrupted run.

        dmpctl patch
        dmpctl patch --iters 500 --run runs/first --json
        dmpctl patch --base runs/pretrain-photos --data photos/ --preset dmp
        dmpctl patch --gate topk --topk 8 --print-config
        """,
    ),
    Row(
        "sample",
        "sampling.generate:sample",
        """Sample images with a patch, or with its backbone alone.

        Image k depends on the seed and k only. Images that are there already are kept. --prompt and --prompts are captions; a
        patch's own prompts are vectors.

        dmpctl sample runs/digits
        dmpctl sample runs/digits --unpatched --num-images 16
        dmpctl sample runs/digits --sampler ddim --steps 50 --format npz
        """,
        RUN,
    ),
    Row(
        "fid",
        "measuring.evaluate:fid",
        """Measure the Frechet distance to real images.

        WHAT is a run, whose patched images are then made, a folder of images, an npz in ADM's layout, or a file of statistics.
        Every number comes with its protocol and how sure it is. An interrupted command continues when you give it again.

        dmpctl fid runs/digits --versus backbone
        dmpctl fid images/ --reference photos/ --metrics fid,pr,kid --noise-floor
        dmpctl fid samples.npz --reference VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is,pr
        dmpctl fid runs/ffhq --fail-above 6.0 --strict --json
        dmpctl fid runs/ffhq --show
        """,
        Argument("what", str, "Run, folder of images, npz or file of statistics."),
    ),
    Row(
        "compare",
        "studies.compare:compare",
        """Compare variants over seeds, with tests and a plot.

        FILE is TOML. [compare]: run, seeds, tuning_seeds, eval_data, eval_images, against. [stages]: NAME = what --base takes.
        [settings]: options of patch for all. [variants.NAME]: options of patch; tune.OPTION = [values to choose from on the
        tuning seeds]; stages = [only these]; continue = true trains the backbone itself on. Finished parts are not repeated,
        and the same command started twice shares the work.

        dmpctl compare examples/digits-table1.toml --dry-run
        dmpctl compare examples/digits-table1.toml
        """,
        Argument("file", Path, "TOML file of the study."),
    ),
    Row(
        "inspect-gates",
        "gates.inspect:inspect",
        """Show how the gates mix the prompts, per block and timestep.

        Needs no images: the gates see only the timestep, the label or caption, and the block index. The prompts shown are
        trained vectors; --prompt and --prompts name captions, for text-conditional backbones.

        dmpctl inspect-gates runs/digits
        dmpctl inspect-gates runs/digits --timesteps 20 --no-plot --json
        dmpctl inspect-gates runs/digits --with-backbone --compare runs/other
        dmpctl inspect-gates runs/digits --watch 30
        """,
        RUN,
    ),
    Row(
        "report",
        "reports.report:report",
        """Write a run as one HTML page that stands alone.

        No script, no font and no picture is fetched. It has what the run was asked, the verdicts, before and after on the same
        seeds, measurements, curves, gates, and the command that makes the run again.

        dmpctl report runs/digits
        dmpctl report runs/digits --out digits.html
        """,
        Argument("run", Path, "Run of dmpctl patch or pretrain."),
    ),
    Row(
        "push",
        "exchange.push:push",
        """Publish a patch on the Hub, with a card.

        WHAT is a run, then where it goes, hf://OWNER/NAME. Uploads patch.safetensors, patch.json and README.md in one commit;
        others use it by its address: dmpctl sample hf://OWNER/NAME@REVISION. A backbone that only you have goes along under
        --with-backbone.

        dmpctl push runs/digits hf://me/digits-dmp
        dmpctl push runs/photos-patched hf://me/photos-dmp --with-backbone --private
        dmpctl push runs/digits hf://me/digits-dmp --dry-run
        """,
        Argument("what", list[str], "Run, then hf://OWNER/NAME."),
    ),
    Row(
        "import",
        "exchange.importer:import_file",
        """Import a published checkpoint as a run.

        FILE is a published DMP checkpoint (.pt), whose backbone and patch come apart; a DiT checkpoint (.pt), which becomes a
        backbone; a .safetensors file, such as export --to merged writes; or a folder with a DiT in diffusers' layout, which
        becomes one in the original layout. Nothing that it pickles is run.

        dmpctl import DiT-XL-2-256x256.pt --run runs/dit-xl
        dmpctl import 0050000.pt --shape DiT-B/2 --schedule cosine
        dmpctl import merged.safetensors --run runs/apart
        """,
        Argument("file", Path, "Checkpoint (.pt), .safetensors file or folder."),
    ),
    Row(
        "export",
        "exchange.export:export",
        """Export a patch or merged weights.

        patch: a folder with the patch alone. merged: one file with its backbone, which sample, fid and inspect-gates take as
        a run; lora and full are folded into the weights. dmp-pt: a checkpoint that the published DMP code reads.

        dmpctl export runs/digits
        dmpctl export runs/digits --to patch --out digits-patch
        dmpctl export runs/digits --to dmp-pt --out 0004000.pt
        """,
        RUN,
    ),
    Row(
        "doctor",
        "reports.doctor:examine",
        """Show versions, devices, caches and the offline state.

        Opens no connection and writes nothing.

        dmpctl doctor
        dmpctl doctor --json
        """,
    ),
)
COMMANDS = {command.name: command for command in ROWS}
