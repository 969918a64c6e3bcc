"""Output directories, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from softpref.errors import UsageError


def new_directory(path: str, resume: str | None) -> Path:
    """Return the output directory; it may hold something only where a run is to be resumed.

    Raises:
        UsageError: it holds another run, or is a file.
    """
    directory = Path(path)
    if directory.is_file():
        raise UsageError(f"--output {path}: is a file; give a directory.")
    if not resume_point(resume) and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(
            f"--output {path}: holds another run; choose a new directory, or go on with an "
            "interrupted run by --resume_from_checkpoint true."
        )
    return directory


def resume_point(value: str | None) -> str | bool | None:
    """Return `True` for the newest complete checkpoint, a path, or None."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


def write_text(path: Path, text: str) -> None:
    """Write a file under another name and rename it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
