"""One results file per target: finished cells of one version of code and data."""

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

RINGS = ("statistics", "algorithm", "data", "models", "training", "world")
MEASURING = (
    "presets",
    "paper",
    "real",
    "real_pairs",
    "evaluators",
    "referees",
    "scorers",
    "confident",
)
"""The study's modules that make numbers; the others choose cells and write tables."""


def code_version(rings: Sequence[str] = (*RINGS, "study")) -> str:
    """Return a hash of every source file that makes a number."""
    root = Path(str(softpref.__file__)).parent
    digest = hashlib.sha256()
    for ring in rings:
        for path in sorted((root / ring).rglob("*.py")):
            if ring == "study" and path.stem not in MEASURING:
                continue
            name = path.relative_to(root).as_posix()
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass
class Results:
    """The finished cells of a target, stored in a file.

    Attributes:
        path: the JSON file.
        version: code and data version, the same for every cell in the file.
        cells: numbers by name, by the cell's key.
    """

    path: Path
    version: dict[str, Any]
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, version: dict[str, Any]) -> Results:
        """Return the contents of the file, or no results without one.

        Raises:
            UsageError: the file has results of another version of code or data.
        """
        if not path.is_file():
            return cls(path, version)
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["version"] != version:
            differing = [name for name in version if stored["version"].get(name) != version[name]]
            raise UsageError(
                f"{path} holds results of another version ({', '.join(differing)} differ): move it "
                "away, or choose another --output."
            )
        return cls(path, version, stored["cells"])

    @property
    def version_hash(self) -> str:
        """A short hash of the version, which names the directory of its runs."""
        return hashlib.sha256(json.dumps(self.version, sort_keys=True).encode()).hexdigest()[:16]

    def add(self, key: str, numbers: dict[str, Any]) -> None:
        """Add a finished cell and write the file."""
        self.cells[key] = numbers
        contents = {"version": self.version, "cells": dict(sorted(self.cells.items()))}
        write_text(self.path, json.dumps(contents, indent=1) + "\n")
