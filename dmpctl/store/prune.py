"""`dmpctl download --prune`: removes from the cache what no row of the registry names, and what downloads left over.

The Hub's own cache is shared with other programs and left alone; one inside ours is not.
"""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from dmpctl.files import amount, writing
from dmpctl.store.cache import cache_dir, changing_index, files_dir, hub_dir, own_hub, read_index, working_on
from dmpctl.store.fetch import target_of
from dmpctl.store.registry import Registry, address_of
from dmpctl.types import Report


def prune(rows: Registry, dry_run: bool) -> Report:
    """Remove it (or say what would be removed): each path with its bytes. What another process is fetching stays."""
    found: list[dict[str, str]] = []
    total = 0
    for path, name in list(_strays(rows)):
        with nullcontext(True) if dry_run else working_on(name, wait=False) as free:
            if not free:
                continue
            size = size_of(path)
            total += size
            found.append({"path": str(path), "size": amount(size)})
            if not dry_run:
                with writing(path):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    if not dry_run and any(name not in rows for name in read_index().entries):
        with changing_index() as index:
            index.entries = {name: entry for name, entry in index.entries.items() if name in rows}
    lines = [f"{'would free' if dry_run else 'freed'} {amount(total)} in {cache_dir()}"]
    if not own_hub():
        lines.append(f"the Hub's cache, {hub_dir()}, belongs to other programs, too: hf cache prune")
    return Report({"removed": found, "bytes": total, "dry_run": dry_run}, tuple(found), tuple(lines))


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; a link counts as itself."""
    if path.is_dir() and not path.is_symlink():
        return sum(size_of(child) for child in path.iterdir())
    return path.lstat().st_size


def _strays(rows: Registry) -> Iterator[tuple[Path, str]]:
    """Files and repositories that no row names, and halves of downloads; each with the lock that guards it."""
    for folder in sorted(files_dir().glob("*")):
        row = rows.get(folder.name)
        if row is None or row.repo is not None or not folder.is_dir():
            yield folder, folder.name
        else:
            yield from ((path, folder.name) for path in sorted(folder.iterdir()) if path != target_of(row))
    named = {address_of(row).folder: row.name for row in rows.values() if row.repo is not None}
    repositories = [path for kind in ("models", "datasets") for path in hub_dir().glob(f"{kind}--*")] if own_hub() else []
    for folder in sorted(repositories):
        if folder.name not in named:
            yield folder, folder.name
        else:
            yield from ((path, named[folder.name]) for path in sorted(folder.glob("blobs/*.incomplete")))
