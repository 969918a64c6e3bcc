"""Output directories, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def read_columns(path: Path, names: Sequence[str], count: int) -> dict[str, Tensor] | None:
    """Return a cache's columns, (count,) each, or None where the file is missing or damaged."""
    try:
        columns = load_file(path)
    except (OSError, SafetensorError):
        return None
    whole = all(name in columns and len(columns[name]) == count for name in names)
    return columns if whole else None


def write_columns(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Write a cache's columns; of several processes that write the same one, the last stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    save_file({name: values.contiguous() for name, values in columns.items()}, partial)
    os.replace(partial, path)
