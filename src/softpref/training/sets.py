"""The sets of a run or an audit, read from files or objects in memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeAlias

from softpref.columns import STANDARD, Columns, SoftLabelSource
from softpref.data.bad_rows import OnBadRow
from softpref.data.given import Given
from softpref.data.mixing import mixed, shares_of
from softpref.data.sources import LoadedPairs, load_pairs, names_of, subset
from softpref.data.splits import ASSUMED_CORRECT, TRUTH_RESTORED, hold_out_clean, without_ties
from softpref.errors import UsageError

Pairs: TypeAlias = Given | LoadedPairs
TrustedPairs: TypeAlias = Pairs | int
"""Trusted pairs, or how many of the others to hold out."""
EVAL = "eval"
IN_FILE, IN_MEMORY = "given as a file", "given as an object"


@dataclass(frozen=True)
class Sets:
    """The pairs of a run, as read.

    Attributes:
        train: pairs whose labels may be wrong.
        clean: trusted pairs, None where none were given.
        evaluation: pairs to evaluate on by the prefix of their metrics, `eval` or `eval_NAME`.
        provenance: why the trusted pairs are trusted.
    """

    train: LoadedPairs
    clean: LoadedPairs | None
    evaluation: dict[str, LoadedPairs]
    provenance: str

    @property
    def is_held_out(self) -> bool:
        """Whether the trusted pairs are some of the others."""
        return self.provenance in (TRUTH_RESTORED, ASSUMED_CORRECT)


def read_sets(
    train: Any,
    clean: Any,
    evaluation: Any,
    on_bad_row: OnBadRow,
    seed: int,
    mix: Sequence[float] | None = None,
    columns: Columns = STANDARD,
    names: Mapping[str, str] | None = None,
) -> Sets:
    """Read training, clean and evaluation pairs; ties among the last two are dropped.

    Args:
        train: `Pairs`.
        clean: `TrustedPairs` or None.
        evaluation: `Pairs`, a dict of them by name, or None.
        on_bad_row: whether a bad row is an error or is skipped.
        seed: of the draw of a mix, and of trusted pairs to hold out.
        mix: weights of several training files.
        columns: what is read of training pairs, and under which names.
        names: what messages call objects in memory, by parameter.

    Raises:
        UsageError: a set cannot be read, or so many trusted pairs cannot be held out.
    """
    called = {"train": "train", "clean": "clean", "eval": EVAL} | dict(names or {})

    def read(given: Any, name: str, columns: Columns = columns) -> LoadedPairs:
        if isinstance(given, LoadedPairs):
            return given
        return load_pairs(given, on_bad_row=on_bad_row, columns=columns, argument=name)

    shares = shares_of(names_of(train), mix) if mix else None
    pairs = read(train, called["train"])
    sets = {
        key: without_ties(read(given, name, columns.beside_training()), "which evaluate nothing")
        for key, name, given in _evaluations(evaluation, called["eval"])
    }
    count, trusted = held_out_count(clean), None
    if clean is not None and count is None:
        # A temperature of scores is fitted on trusted pairs.
        trusted = read(clean, called["clean"], columns.beside_training("scores"))
        trusted = without_ties(trusted, "which teach nothing: dropped from the trusted pairs")
    if shares:
        pairs = mixed(pairs, shares, seed, trusted)
    if count is None:
        given = IN_FILE if isinstance(clean, str | PathLike) else IN_MEMORY
        return Sets(pairs, trusted, sets, given if trusted else "none given")
    rest, held_out, provenance = hold_out_clean(pairs.pairs, count, seed)
    trusted = subset(pairs, held_out, f"{pairs.source} ({count} held out)")
    trusted = dataclasses.replace(
        trusted, bad_rows=(), fingerprints={trusted.source: trusted.fingerprint}, also_clean=0
    )
    return Sets(subset(pairs, rest, pairs.source), trusted, sets, provenance)


def read_in_memory(
    train: Any,
    clean: Any,
    evaluation: Any,
    on_bad_row: OnBadRow,
    seed: int,
    soft_label_from: SoftLabelSource | None,
    names: Mapping[str, str],
) -> Sets:
    """Read the sets of a run as `read_sets` does, under the standard column names."""
    columns = STANDARD.of_training(soft_label_from)
    given = train, clean, evaluation
    return read_sets(*given, on_bad_row, seed, columns=columns, names=names)


def held_out_count(clean: Any) -> int | None:
    """Return how many pairs to hold out, None where a set is given."""
    if isinstance(clean, str) and re.fullmatch(r"-?\d+", clean):
        return int(clean)
    return clean if type(clean) is int else None


def _evaluations(given: Any, name: str) -> list[tuple[str, str, Any]]:
    """Return prefix, name and pairs of each evaluation set."""
    if given is None:
        return []
    if not isinstance(given, Mapping):
        return [(EVAL, name, given)]
    if not given:
        raise UsageError(f"{name} is an empty {type(given).__name__}: leave it out.")
    return [(f"{EVAL}_{key}", f"{name}[{key!r}]", pairs) for key, pairs in given.items()]
