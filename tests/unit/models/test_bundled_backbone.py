"""The bundled backbone is what its provenance says, and small enough to ship."""

import json
from importlib import resources

from dmpctl.data.bundled import Digits
from dmpctl.files import sha256_of
from dmpctl.models.backbone import load_backbone
from dmpctl.settings.sections import Base
from dmpctl.store.locate import BUNDLED

MOST_BYTES = 4_000_000


def test_the_bundled_backbone_is_what_its_provenance_says() -> None:
    folder = resources.files("dmpctl") / "assets"
    with resources.as_file(folder / BUNDLED["digits"]) as path:
        provenance = json.loads(path.with_suffix(".json").read_text("utf-8"))
        assert path.stat().st_size <= MOST_BYTES
        assert sha256_of(path) == provenance["sha256"]
    loaded = load_backbone(Base(base="digits"))
    assert loaded.digest == provenance["backbone_sha256"]
    assert loaded.spec.parameters == provenance["parameters"]
    assert loaded.spec.latent_shape == (1, 8, 8)
    assert loaded.data == "digits"
    assert provenance["data_fingerprint"] == Digits().fingerprint
