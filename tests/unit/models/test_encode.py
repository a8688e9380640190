"""Building the caches: what is encoded how often, by whom, and what is left after signals, kills and damage."""

import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch

from dmpctl.batches.latents import LatentCache
from dmpctl.codecs.identity import Identity
from dmpctl.data.bundled import Digits
from dmpctl.errors import Interrupted, NumericalError, UsageError
from dmpctl.files import sha256_of
from dmpctl.models import encode as latents
from dmpctl.models.encode import build_conditions, build_latents, training_source
from dmpctl.store.cache import MARGIN
from dmpctl.types import Silent
from tests.helpers import flip, settings_for
from tests.latent_helpers import Ramp

FEW, PER = 30, 8  # images, and images of a shard: four shards, the last of six


class Few(Digits):
    """The first digits. `Held` they are not: `images` is taken away."""

    images = None
    mirror = True

    def __len__(self) -> int:
        return FEW


class Watched(Ramp):
    """Says before each batch what it is about to encode; `at` which call something happens."""

    def __init__(self, happens=None, at: int = 0) -> None:
        super().__init__()
        self.happens, self.at, self.calls = happens, at, 0

    def encode(self, images):
        self.calls += 1
        if self.calls == self.at:
            self.happens()
        return super().encode(images)


class Noted(Silent):
    """Keeps what was shown."""

    def __init__(self) -> None:
        self.shown, self.done, self.figures = [], 0, {}

    def track(self, what, total, start=0):
        self.shown.append((what, total, start))
        return self

    def advance(self, by=1, **figures):
        self.done += by
        self.figures = figures

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None


def build(root, codec, progress=None, **options):
    return build_latents(Few(), codec, root, progress or Silent(), **{"batch": 4, "per_shard": PER, **options})


def hashes(root):
    return {path.name: sha256_of(path) for path in root.rglob("shard-*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    build(root, Ramp())
    return root


def test_each_image_and_mirror_is_encoded_once(tmp_path):
    codec, progress = Ramp(), Noted()
    cache = build(tmp_path, codec, progress)
    assert codec.encoded == 2 * FEW
    assert progress.shown == [("encoding digits", FEW, 0)]
    assert progress.done == FEW
    assert progress.figures["images/s"] > 0
    assert sorted(path.name for path in cache._shards.folder.iterdir()) == [
        ".manifest.lock",
        ".shards.lock",
        "manifest.json",
        *(f"shard-0000{shard}.safetensors" for shard in range(4)),
    ]


def test_the_second_time_nothing_is_encoded(whole):
    codec, progress = Ramp(), Noted()
    before = hashes(whole)
    build(whole, codec, progress)
    assert codec.encoded == 0
    assert progress.shown == []
    assert hashes(whole) == before


def test_neither_batch_nor_loader_processes_change_a_byte(whole, tmp_path):
    build(tmp_path, Ramp(), batch=11, num_workers=2)
    assert hashes(tmp_path) == hashes(whole)


@pytest.mark.parametrize(
    "other",
    [
        {"codec": Ramp("1" * 64)},
        {"flip": False},
        {"dtype": torch.float32},
    ],
)
def test_a_cache_of_another_key_is_never_used(whole, tmp_path, other):
    shutil.copytree(whole, tmp_path / "cache")
    before = hashes(tmp_path / "cache")
    codec = other.pop("codec", Ramp())
    cache = build(tmp_path / "cache", codec, **other)
    assert codec.encoded == FEW * (1 + cache.mirror)
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 2
    other_folder = next(folder for folder in (tmp_path / "cache" / "latents").iterdir() if folder != cache._shards.folder)
    assert hashes(other_folder) == before


def test_a_shard_that_is_whole_when_the_signal_comes_is_kept(tmp_path):
    with pytest.raises(Interrupted, match="16 of 30 are kept"):
        build(tmp_path, Watched(lambda: os.kill(os.getpid(), signal.SIGTERM), at=8))  # mirrors of its last batch


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_ends_it_after_the_batch_and_the_rest_is_made_later(whole, tmp_path, number, code):
    first = Watched(lambda: os.kill(os.getpid(), number), at=5)  # the first batch of the second shard
    with pytest.raises(Interrupted, match=f"stopped by {number.name}, 8 of 30 are kept") as caught:
        build(tmp_path, first, again="dmpctl patch --data DIR")
    assert caught.value.exit_code == code
    assert caught.value.hint == "go on with: dmpctl patch --data DIR"
    assert first.calls == 6  # the mirrors of that batch, and no more
    assert set(hashes(tmp_path)) == {"shard-00000.safetensors"}
    rest, progress = Ramp(), Noted()
    build(tmp_path, rest, progress)
    assert rest.encoded == 2 * (FEW - PER)
    assert progress.shown == [("encoding digits", FEW, PER)]
    assert progress.done == FEW - PER
    assert hashes(tmp_path) == hashes(whole)


def test_damage_is_repaired_and_only_that(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "cache")
    shards = build(tmp_path / "cache", Ramp())._shards
    shards.path(1).unlink()
    os.truncate(shards.path(3), 50)
    codec = Ramp()
    build(tmp_path / "cache", codec)
    assert codec.encoded == 2 * (8 + 6)
    flip(shards.path(2))
    codec = Ramp()
    build(tmp_path / "cache", codec)
    assert codec.encoded == 2 * 8
    assert hashes(tmp_path / "cache") == hashes(whole)


class Slow(Ramp):
    """Writes down who encodes what: one line per batch."""

    def __init__(self, book, seconds: float) -> None:
        super().__init__()
        self.book, self.seconds = book, seconds

    def encode(self, images):
        with self.book.open("a") as file:
            file.write(f"{os.getpid()} {len(images)}\n")
        time.sleep(self.seconds)
        return super().encode(images)


def build_alone(root, codec):
    torch.set_num_threads(1)  # torch's thread pool does not survive a fork
    build(root, codec)


def in_process(root, codec):
    process = multiprocessing.get_context("fork").Process(target=build_alone, args=(root, codec))
    process.start()
    return process


def images_by_process(book):
    counts: dict[str, int] = {}
    for line in book.read_text().splitlines():
        pid, count = line.split()
        counts[pid] = counts.get(pid, 0) + int(count)
    return counts


def test_two_processes_share_the_work_and_repeat_none(whole, tmp_path):
    book = tmp_path / "book"
    processes = [in_process(tmp_path / "cache", Slow(book, 0.1)) for _ in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    counts = images_by_process(book)
    assert len(counts) == 2
    assert sum(counts.values()) == 2 * FEW
    assert hashes(tmp_path / "cache") == hashes(whole)


def test_what_another_has_finished_just_before_is_not_made_again(whole, tmp_path, monkeypatch):
    done = build(whole, Ramp())._shards.tensors()

    class Late(latents.Claims):
        def take(self, shard):
            if shard == 2 and shard not in self.shards.finished():
                self.shards.write(shard, done[shard])
            return super().take(shard)

        def __init__(self, shards) -> None:
            super().__init__(shards)
            self.shards = shards

    monkeypatch.setattr(latents, "Claims", Late)
    codec, progress = Ramp(), Noted()
    build(tmp_path, codec, progress)
    assert codec.encoded == 2 * (FEW - PER)
    assert progress.done == FEW
    assert hashes(tmp_path) == hashes(whole)


def test_the_work_of_a_process_that_was_killed_is_taken_over(whole, tmp_path):
    book = tmp_path / "book"
    doomed = in_process(tmp_path / "cache", Slow(book, 60))
    while not (book.exists() and book.read_text()):
        time.sleep(0.01)
    other = in_process(tmp_path / "cache", Slow(book, 0))
    while len(hashes(tmp_path / "cache")) < 3:
        time.sleep(0.01)
    assert other.is_alive()  # it waits for the shard that is taken
    os.kill(doomed.pid or 0, signal.SIGKILL)
    doomed.join(30)
    other.join(30)
    assert other.exitcode == 0
    assert images_by_process(book)[str(other.pid)] == 2 * FEW
    assert hashes(tmp_path / "cache") == hashes(whole)


def test_waiting_for_another_ends_with_a_signal_too(tmp_path):
    book = tmp_path / "book"
    holder = in_process(tmp_path / "cache", Slow(book, 60))
    while not (book.exists() and book.read_text()):
        time.sleep(0.01)
    try:
        timer = multiprocessing.get_context("fork").Process(
            target=lambda pid: (time.sleep(1), os.kill(pid, 15)), args=(os.getpid(),)
        )
        timer.start()
        with pytest.raises(Interrupted, match="22 of 30 are kept"):
            build(tmp_path / "cache", Ramp())
        timer.join(30)
    finally:
        os.kill(holder.pid or 0, signal.SIGKILL)
        holder.join(30)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_encoded(whole, tmp_path, free_bytes):
    codec, needed = Ramp(), FEW * 2 * 2 * 1 * 4 * 4 * 2 + MARGIN  # images, views, mean and logvar, C, h, w, bytes
    free_bytes(needed - 1)
    with pytest.raises(UsageError, match=r"encoding digits once and for all needs 3\.84 kB in "):
        build(tmp_path, codec)
    assert codec.encoded == 0
    build(whole, codec)  # what is there needs nothing more
    free_bytes(needed)
    build(tmp_path, codec)
    assert codec.encoded == 2 * FEW


class Breaking(Ramp):
    """Encodes one image to what float16 cannot hold."""

    def __init__(self, image) -> None:
        super().__init__()
        self.image = image

    def encode(self, images):
        moments = super().encode(images)
        moments.mean[(images == self.image).flatten(1).all(1)] = 1e5
        return moments


def test_latents_that_are_not_finite_stop_it_by_name(tmp_path):
    with pytest.raises(NumericalError, match="ramp gives latents of image 21 of digits that are not finite"):
        build(tmp_path, Breaking(Few().item(21)[0]))
    assert set(hashes(tmp_path)) == {"shard-00000.safetensors", "shard-00001.safetensors"}


def test_a_codec_without_variance_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing to cache") as caught:
        build(tmp_path, Identity())
    assert caught.value.hint == "add --no-latents"


def test_training_reads_the_cache_unless_it_should_not(tmp_path, monkeypatch):
    monkeypatch.setenv("DMPCTL_CACHE_DIR", str(tmp_path))

    def read(codec, **given):
        return training_source(settings_for("pretrain", data="digits", **given), Few(), codec, "cpu", Silent(), "again")

    cached, unmirrored = read(Ramp()), read(Ramp(), hflip=False)
    assert isinstance(cached, LatentCache)
    assert isinstance(unmirrored, LatentCache)
    assert (cached.mirror, unmirrored.mirror) == (True, False)
    assert len(list((tmp_path / "latents").iterdir())) == 2
    assert isinstance(read(Ramp(), latents=False), Few)
    assert isinstance(read(Identity()), Few)


class Letters:
    """A text encoder: one letter a token, its state the code of the letter."""

    name, revision, max_length, width = "letters", "r1", 6, 3

    def __init__(self) -> None:
        self.encoded = 0

    def __call__(self, captions):
        self.encoded += len(captions)
        codes = torch.tensor([[ord(c) for c in caption[:6].ljust(6, "\0")] for caption in captions])
        return codes[..., None].repeat(1, 1, 3).float(), codes > 0


def test_captions_are_encoded_once_with_the_null_caption_behind_them(tmp_path):
    captions, encoder = ["a cat", "a dog", "ä", "four", "five"], Letters()
    cache = build_conditions(captions, encoder, tmp_path, Silent(), batch=2, per_shard=4)
    assert encoder.encoded == 6
    assert len(cache) == 5
    states, mask = cache.gather(torch.tensor([4, 0, 2]))
    assert (states.dtype, mask.dtype) == (torch.float16, torch.bool)
    expected = Letters()(["five", "a cat", "ä"])
    assert torch.equal(states, expected[0].half())
    assert torch.equal(mask, expected[1])
    null, padding = cache.gather(torch.tensor([len(cache)]))
    assert null.shape == (1, 6, 3)
    assert not padding.any()
    again = build_conditions(captions, encoder, tmp_path, Silent(), per_shard=4)
    assert encoder.encoded == 6
    assert again.fingerprint == cache.fingerprint
    assert build_conditions([*captions[1:], captions[0]], encoder, tmp_path, Silent()).fingerprint != cache.fingerprint
    encoder.revision = "r2"
    build_conditions(captions, encoder, tmp_path, Silent(), per_shard=4)
    assert encoder.encoded == 18
