"""Things that the pages name are there: files, rooms, links, modules."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def is_there(name: str) -> bool:
    """Whether a path that a page names exists: from the root, from the package, or with its suffix left out."""
    return any((root / f"{name}{suffix}").exists() for root in (ROOT, ROOT / "dmpctl") for suffix in ("", ".py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize(
    "page",
    [
        ROOT / "ARCHITECTURE.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "docs/extend.md",
        *sorted((ROOT / "docs/decisions").glob("*.md")),
    ],
    ids=lambda path: path.name,
)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.[a-z]+)?)`", page.read_text("utf-8"))
    assert [name for name in named if not is_there(name)] == []


def test_every_room_is_on_the_page() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rooms = {path.parent.name for path in (ROOT / "dmpctl").glob("*/__init__.py")}
    assert {room for room in rooms if not re.search(rf"\b{room}\b", page)} == set()
