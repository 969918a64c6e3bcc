"""Numeric columns cached on disk between runs; every cache is optional."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from softpref.data.temporary import replacing

logger = logging.getLogger(__name__)

REFERENCE_CACHE = (
    "Directory that caches model scores of pairs between runs; default: softpref's user cache."
)


def default_cache() -> Path:
    """Return softpref's directory in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "softpref" / "reference"


class ColumnCache:
    """A directory of columns with checksums; after a failed write, nothing more is stored.

    Args:
        directory: its path; None for `default_cache`.
    """

    def __init__(self, directory: str | None) -> None:
        self._directory = Path(directory) if directory else default_cache()
        self._is_writable = True

    def read(self, name: str, columns: Sequence[str], count: int) -> dict[str, Tensor] | None:
        """Return the columns stored under a name, (count, ...) each, or None if there are none."""
        return read_columns(self._path(name), columns, count)

    def write(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Store columns under a name; after a failure, warn and stop writing."""
        if not self._is_writable:
            return
        try:
            write_columns(self._path(name), columns)
        except (OSError, SafetensorError) as error:
            self._is_writable = False
            reason = getattr(error, "strerror", None) or error
            logger.warning(
                f"warning: the cache {self._directory} cannot be written ({reason}): this run "
                "continues without it, and the next run scores again. Make room, or choose a "
                "writable directory with --reference_cache or XDG_CACHE_HOME."
            )

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"


def read_columns(path: Path, names: Sequence[str], count: int) -> dict[str, Tensor] | None:
    """Return a cache's columns, (count,) each, or None if the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            seal = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    is_complete = all(name in columns and len(columns[name]) == count for name in names)
    return columns if is_complete and seal == _seal(columns) else None


def write_columns(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Write a cache's columns; if several processes write the same file, the last one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: values.contiguous() for name, values in columns.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"sha256": _seal(tensors)})


def _seal(columns: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(columns.items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
