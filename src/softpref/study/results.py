"""One results file per target: finished cells, of one version of code and data and no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import softpref
from softpref.errors import UsageError
from softpref.training.output import write_text

RINGS = ("algorithm", "data", "training", "evaluation", "world")


def code_version(rings: Sequence[str] = RINGS) -> str:
    """Return a hash of every source file that a result can depend on, whatever the commit."""
    root = Path(str(softpref.__file__)).parent
    digest = hashlib.sha256()
    for ring in rings:
        for path in sorted((root / ring).glob("*.py")):
            digest.update(f"{ring}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass
class Results:
    """The finished cells of a target, by key, kept in a file.

    Attributes:
        path: the file, JSON.
        version: what must be the same for every cell of it: code, and what the preset says of data.
        cells: numbers by name, by the cell's key.
    """

    path: Path
    version: dict[str, Any]
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, version: dict[str, Any]) -> Results:
        """Return what the file holds, or nothing where there is none.

        Raises:
            UsageError: it holds results of another version of code or data.
        """
        if not path.is_file():
            return cls(path, version)
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["version"] != version:
            differing = [name for name in version if held["version"].get(name) != version[name]]
            raise UsageError(
                f"{path} holds results of another version ({', '.join(differing)} differ); results "
                "of two versions are never mixed: move it away, or choose another --output."
            )
        return cls(path, version, held["cells"])

    @property
    def version_hash(self) -> str:
        """A short name of the version, for the directory of its runs."""
        return hashlib.sha256(json.dumps(self.version, sort_keys=True).encode()).hexdigest()[:16]

    def add(self, key: str, numbers: dict[str, Any]) -> None:
        """Keep a finished cell, on disk before this returns."""
        self.cells[key] = numbers
        held = {"version": self.version, "cells": dict(sorted(self.cells.items()))}
        write_text(self.path, json.dumps(held, indent=1) + "\n")
