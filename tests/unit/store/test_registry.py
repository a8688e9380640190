"""The shipped rows, and what users put over them."""

import pytest

from dmpctl.errors import UsageError
from dmpctl.metrics.features.inception import PUBLISHED_SHA256
from dmpctl.settings.assets import AssetRow, Assets
from dmpctl.settings.model import Settings
from dmpctl.store.registry import expanded, published, registry_of, row_named, shipped


def settings(*rows: AssetRow) -> Settings:
    return Settings(assets=Assets(rows=rows))


def test_every_row_can_be_fetched_or_says_why_not():
    for name, row in shipped().items():
        assert name == row.name
        assert row.what
        assert row.licence != "unknown" or (row.notes and ("licence" in row.notes or "by hand" in row.notes))
        assert row.url is None or row.url.startswith("https://")
        assert row.revision is None or row.pinned
        assert {*row.needs, *row.parts} <= set(shipped())
        assert not row.gated or row.alternative


def test_what_the_experiments_name_is_there():
    names = set(shipped())
    assert {"dit-xl2-256", "dit-xl2-512", "vae-ema", "vae-mse", "sd15", "pixart-256", "ffhq", "imagenet", "coco"} <= names
    assert {"laion-art", "inception", "dinov2", "adm-imagenet-256", "adm-imagenet-512", "fid-stats-coco"} <= names
    assert {name for name, row in shipped().items() if row.non_commercial} >= {"dit-xl2-256", "dit-xl2-512", "ffhq", "imagenet"}


def test_a_row_is_read_as_users_write_theirs():
    assert shipped()["vae-mse"] == AssetRow(
        name="vae-mse",
        what="SD VAE, mse",
        kind="codec",
        repo="stabilityai/sd-vae-ft-mse",
        revision="31f26fdeee1355a5c34592e401dd41e45d25a493",
        file="diffusion_pytorch_model.safetensors",
        allow=("config.json",),
        sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        size=334_643_276,
        licence="MIT",
    )


def test_published_data_is_read_from_rows_that_are_there():
    for name, how in published().items():
        assert {how.row or name, *filter(None, [how.captions])} <= set(shipped())


def test_the_extractor_and_the_registry_mean_the_same_file():
    assert shipped()["inception"].sha256 == PUBLISHED_SHA256


def test_a_row_of_the_user_takes_the_place_of_a_shipped_one():
    own = AssetRow(name="vae-ema", url="https://example.org/v.safetensors")
    mine = AssetRow(name="mine", url="https://example.org/m.pt")
    rows = registry_of(settings(own, mine))
    assert (rows["vae-ema"], rows["mine"]) == (own, mine)
    assert registry_of() == shipped()


def test_a_row_that_names_no_row():
    with pytest.raises(UsageError, match=r"\[assets.mine\] names nothing, which is no asset"):
        registry_of(settings(AssetRow(name="mine", parts=("nothing",))))


def test_the_nearest_name():
    with pytest.raises(UsageError, match="incption is no known download") as failure:
        row_named("incption", shipped())
    assert failure.value.hint == "did you mean inception?"
    with pytest.raises(UsageError) as failure:
        row_named("qqqqqq", shipped())
    assert "--list" in failure.value.hint


def test_parts_are_fetched_in_place_of_the_whole():
    rows = expanded(["coco", "coco-val2014", "inception"], shipped())
    assert [row.name for row in rows] == ["coco-train2014", "coco-val2014", "coco-annotations", "inception"]
