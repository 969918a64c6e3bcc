"""`cleaned.jsonl`: the audited data in its own format, with what the audit found.

Rows keep their order and every column that they had.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from softpref.data.readers import read_rows
from softpref.data.sources import Intake, content_key
from softpref.training.output import write_lines

CLEANED = "cleaned.jsonl"
EXPORTS = {
    "soft": "cleaned.jsonl carries `soft_label`, which TRL ignores: methods gdpo and cdpo of "
    "softpref train read it; for TRL use --export drop",
    "keep": "cleaned.jsonl marks suspects by `is_suspect` and changes no label",
    "drop": "cleaned.jsonl leaves the suspects out; TRL can train on it as it is",
    "flip": "cleaned.jsonl turns the suspects round; look at some of them before you train on it",
}
"""What is said of each way to write it."""


@dataclass(frozen=True)
class Trusted:
    """The trusted pairs by content, whichever way round, and which response is the better."""

    better: dict[str, str]

    @classmethod
    def of(cls, clean: Dataset) -> Trusted:
        """Take them from the trusted set."""
        columns = (clean[name] for name in ("prompt", "chosen", "rejected"))
        return cls(
            {content_key(p, c, r): _text(c) for p, c, r in zip(*columns, strict=True)}
        )  # fmt: skip

    def p_correct(self, pair: dict[str, Any]) -> float | None:
        """Return 1 where a pair is labelled as its trusted one is, 0 where not, None for others."""
        better = self.better.get(content_key(pair["prompt"], pair["chosen"], pair["rejected"]))
        return None if better is None else float(better == _text(pair["chosen"]))


def write_cleaned(data: str, output: Path, audited: Dataset, trusted: Trusted, export: str) -> Path:
    """Write the data's rows with `soft_label` and `is_suspect`, and return the file's path.

    `soft_label` holds `p_correct` and is written under `soft` alone. Trusted pairs among the data
    are certain. Rows that the audit could not use are left out.

    Args:
        data: what was audited.
        output: the audit's directory.
        audited: the rows of the audit.
        trusted: the trusted pairs.
        export: one of `EXPORTS`.
    """
    p_correct = dict(zip(audited["row"], audited["p_correct"], strict=True))
    suspect = {row for row, flag in zip(audited["row"], audited["flag"], strict=True)
               if flag == "suspect"}  # fmt: skip
    path = output / CLEANED
    write_lines(path, _cleaned(data, p_correct, suspect, trusted, export))
    return path


def _cleaned(
    data: str, p_correct: dict[int, float], suspect: set[int], trusted: Trusted, export: str
) -> Iterator[dict[str, Any]]:
    intake = Intake(data, "skip")
    for number, raw in read_rows(data):
        pair = intake.admit(number, raw)
        if pair is None or not isinstance(raw, dict):
            continue
        known = trusted.p_correct(pair)
        p = p_correct.get(number) if known is None else known
        if p is None:
            continue
        is_suspect = number in suspect if known is None else known == 0
        if is_suspect and export == "drop":
            continue
        row: dict[str, Any] = {**raw, "is_suspect": is_suspect}
        if export == "soft":
            row["soft_label"] = p
        if export == "flip" and is_suspect:
            row |= {"chosen": raw["rejected"], "rejected": raw["chosen"]}
            if "is_flipped" in raw:
                row["is_flipped"] = not raw["is_flipped"]
        yield row


def _text(response: Any) -> str:
    return json.dumps(response, sort_keys=True)
