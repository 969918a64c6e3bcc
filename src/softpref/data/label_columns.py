"""Optional columns that say more of a label than one bit: weights, margins, scores, votes, ties."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from softpref.columns import LABEL_NUMBERS, SCORES, VOTES, Columns
from softpref.data.readers import RowError, column

LABEL, TIE = "label", "tie"
"""The column whose text "tie", in any case, says that neither response is better."""


def read_label_columns(raw: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Return the numbers of a row that are to be read, as floats, and `label` where it is a tie.

    A number may be written as text. An empty cell is a missing one.

    Raises:
        RowError: a number is out of its range, or a required one is missing.
    """
    found: dict[str, Any] = {}
    for name in LABEL_NUMBERS:
        if name not in columns.optional and name not in columns.required:
            continue
        value = _parsed(raw.get(name))
        if value is not None:
            found[name] = _in_range(name, value)
        elif name in columns.required:
            raise RowError(
                f"has no {name}, which --soft_label_from {columns.soft_label_from} reads of every "
                "pair"
            )
    label = None if LABEL in columns.names else raw.get(LABEL)
    if isinstance(label, str) and label.strip().lower() == TIE:
        found[LABEL] = TIE
    return found


def is_tie(pair: Mapping[str, Any]) -> bool:
    """Return whether a pair row says that neither response is better."""
    return pair.get(LABEL) == TIE


def ties(pairs: Dataset) -> list[bool]:
    """Return which of the pair rows are ties."""
    if LABEL not in pairs.column_names:
        return [False] * len(pairs)
    return [label == TIE for label in column(pairs, LABEL).to_pylist()]


def labelled(pairs: Dataset) -> Dataset:
    """Return the pair rows without ties, which have no label that could be right or wrong."""
    tied = ties(pairs)
    return pairs.select([at for at, one in enumerate(tied) if not one]) if any(tied) else pairs


def _parsed(value: object) -> object:
    """Return a number that is written as text; None for an empty text."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value)
    return value if value.strip() else None


def _in_range(name: str, value: object) -> float:
    least = -sys.float_info.max if name in SCORES else 0
    if isinstance(value, int | float) and not isinstance(value, bool):
        in_range = least <= value <= sys.float_info.max
        if in_range and (name not in VOTES or value == int(value)):
            return float(value)
    kind = "whole" if name in VOTES else "finite"
    raise RowError(f"{name} is not a {kind} number" + (" of at least 0" if least == 0 else ""))
