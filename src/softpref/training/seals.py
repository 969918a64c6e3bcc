"""Which files belong to a directory, and whether they are as they were written.

`manifest.json` holds size and sha256 of each file; checkpoints and finished runs have one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from softpref.data.temporary import fsync

MANIFEST = "manifest.json"
PARTIAL = ".partial-"
"""Begins the names of what is not whole yet, or about to be deleted."""


def write_manifest(directory: Path, files: Mapping[str, Path]) -> None:
    """Write a manifest of files, by the names that they have, or will have, in the directory."""
    sealed = {name: seal(path) for name, path in files.items()}
    text = json.dumps({"format": 1, "files": sealed}, indent=2)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def defect(directory: Path) -> str | None:
    """Return what is not as the directory's manifest has it; None if all is."""
    try:
        files = dict(json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"])
        paths = [path for path in directory.rglob("*") if path.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {MANIFEST}, so it was not written to the end, or not by softpref"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"its {MANIFEST} is damaged"
    present = {path.relative_to(directory).as_posix() for path in paths}
    for name, recorded in files.items():
        if name not in present:  # no path in a manifest is followed
            return f"{name} is missing"
        if seal(directory / name) != recorded:
            return f"{name} is damaged, or was changed after softpref wrote it"
    return None


def seal(path: Path) -> dict[str, int | str]:
    """Return a file's size and sha256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def publish(partial: Path, final: Path) -> None:
    """Make a directory durable, then visible under its final name."""
    paths = sorted(partial.rglob("*"))
    files = {path.relative_to(partial).as_posix(): path for path in paths if path.is_file()}
    write_manifest(partial, files)
    for path in [*paths, partial / MANIFEST, partial]:
        fsync(path)
    # A directory cannot be renamed over one that is not empty.
    replaced = put_aside(final) if final.exists() else None
    partial.rename(final)
    fsync(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def put_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint before it is deleted, so that a crash never leaves half of it."""
    return checkpoint.rename(checkpoint.with_name(f"{PARTIAL}old-{checkpoint.name}"))
