"""Numeric columns cached on disk between runs; every cache is optional."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
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

    def read(
        self, name: str, columns: Sequence[str], count: int | None = None
    ) -> dict[str, Tensor] | None:
        """Return the columns under a name, (count, ...) each; None if missing or damaged.

        Without a count, any one length will do. A damaged file is logged.
        """
        path = self._path(name)
        found: dict[str, Tensor] = {}
        seal = None
        try:
            with safe_open(path, "pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                seal = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            if not path.is_file():
                return None
        lengths = {len(found[key]) if key in found else None for key in columns}
        is_complete = len(lengths) == 1 and None not in lengths and count in (None, *lengths)
        if is_complete and seal == _seal(found):
            return found
        logger.warning("warning: %s is damaged: what it held is computed again", path)
        return None

    def write(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Store columns under a name; of several processes that write it, the last one wins.

        After a failure, warn and stop writing.
        """
        if not self._is_writable:
            return
        path = self._path(name)
        tensors = {key: values.contiguous() for key, values in columns.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                # Not save_file, which renames a file of its own over this one and its lock.
                partial.write_bytes(save(tensors, metadata={"sha256": _seal(tensors)}))
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


def _seal(columns: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(columns.items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
