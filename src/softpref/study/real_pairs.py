"""Real pairs with known right labels: reading, splitting by prompt, and adding wrong labels."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any

from softpref.data.bad_rows import place
from softpref.data.messages import CONTEXT, Text, texts_of
from softpref.data.readers import dataset_rows, read_rows
from softpref.data.sources import CONTENT, load_pairs
from softpref.data.splits import without_ties
from softpref.errors import UsageError

FLIPS, JUDGE = "flips", "judge"
TEST_PROMPTS, TRUSTED_PROMPTS = 0.3, 0.2
"""Shares of a file's prompts; the rest is for training."""
LEAST_TRAIN = 8
"""Minimum training pairs of a cell: one batch."""
_Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Numbers of pairs in a cell, and their maximum length.

    Attributes:
        trusted: number of trusted pairs with right labels.
        train: maximum number of training pairs.
        test: number of held-out pairs with right labels.
        longest: maximum characters in prompt and both responses together.
    """

    trusted: int
    train: int
    test: int
    longest: int


@dataclass(frozen=True)
class KnownPair:
    """A pair with the better response as `chosen`.

    Attributes:
        row: `uid`, prompt, responses and further columns for a chat template.
        mistaken: whether a judge preferred the other response, by name of the judge.
    """

    row: _Row
    mistaken: Mapping[str, bool]

    @property
    def prompt(self) -> str:
        """The prompt as JSON, a key for grouping."""
        return json.dumps(self.row["prompt"])

    @property
    def length(self) -> int:
        """Number of characters in prompt and both responses."""
        return sum(characters(self.row[name]) for name in ("prompt", "chosen", "rejected"))


@dataclass(frozen=True)
class Split:
    """Pairs of one file in three parts that share no prompt; `pool` is for training."""

    test: list[_Row]
    trusted: list[_Row]
    pool: list[KnownPair]


def characters(text: Text) -> int:
    """Return how many characters people wrote."""
    return sum(map(len, texts_of(text)))


def set_name(path: str) -> str:
    """Return a short name of a file and of what it holds, fit for a file's name."""
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    except OSError as error:
        raise UsageError(f"--pairs {path}: {error.strerror}; give files of pairs.") from None
    names = Path(path).resolve().parent.name, Path(path).stem
    folder, stem = (os.fsencode(name)[:80].decode(errors="ignore") for name in names)
    return f"{folder}.{stem}@{digest}"  # which is a part of a directory's name


def parse_labels(given: str) -> str:
    """Return the canonical spelling of a source of labels.

    Raises:
        UsageError: it is neither `flips:RATE` nor `judge:NAME`.
    """
    kind, _, value = given.partition(":")
    if kind == JUDGE and value:
        return given
    try:
        rate = float(value)
    except ValueError:
        rate = -1
    if kind != FLIPS or not 0 <= rate < 1:
        raise UsageError(
            f"--labels {given}: give flips:RATE, a share of pairs in [0, 1), or judge:NAME, a "
            "judge in the files' column `judges`."
        )
    return f"{FLIPS}:{rate:g}"


def load_known_pairs(path: str, *, as_chat: bool) -> list[KnownPair]:
    """Read a file's pairs with the better response as `chosen`.

    Rows are preference pairs with right labels, or have `response_1`, `response_2` and `gold`, 1 or
    2. In the second form `judges` may map a judge's name to the response that it preferred: 1 or 2,
    a list of which the first counts, or null for no decision.

    Args:
        path: a file that `load_pairs` can read.
        as_chat: convert plain texts to messages of a user and an assistant.

    Raises:
        UsageError: a row cannot be read.
    """
    _, first = next(read_rows(path), (0, None))
    if isinstance(first, dict) and "gold" in first:
        rows, mistaken = _by_gold(path)
        loaded = load_pairs(rows, argument=path)
    else:
        loaded = without_ties(load_pairs(path), "which have no right label: dropped")
        mistaken = [{}] * len(loaded.pairs)
    if {"is_flipped", "soft_label"} & set(loaded.pairs.column_names):
        raise UsageError(
            f"{path} has is_flipped or soft_label, but study --preset real makes its own labels: "
            "give the original pairs."
        )
    pairs = [
        {name: row[name] for name in ("uid", *CONTENT) if row.get(name) is not None}
        for row in dataset_rows(loaded.pairs)
    ]
    if as_chat:
        pairs = [_as_chat(row) for row in pairs]
    return [KnownPair(row, errors) for row, errors in zip(pairs, mistaken, strict=True)]


def _by_gold(path: str) -> tuple[list[_Row], list[dict[str, bool]]]:
    rows, mistaken = [], []
    for number, raw in read_rows(path):
        try:
            gold = raw["gold"]  # type: ignore[index]
            better, worse = raw[f"response_{gold}"], raw[f"response_{3 - gold}"]  # type: ignore[index]
            verdicts = _first_verdicts(raw.get("judges") or {})  # type: ignore[attr-defined]
            row = {"prompt": raw["prompt"], "chosen": better, "rejected": worse}  # type: ignore[index]
            rows.append(row | {name: raw[name] for name in CONTEXT if name in raw})  # type: ignore[index,operator]
        except (KeyError, TypeError, AttributeError, IndexError):
            raise UsageError(
                f"{place(path, number)}: give prompt, response_1, response_2, gold (1 or 2) and, "
                "for judge:NAME, judges as {NAME: 1 or 2}."
            ) from None
        mistaken.append({name: verdict != gold for name, verdict in verdicts.items()})
    return rows, mistaken


def _first_verdicts(judges: Mapping[str, Any]) -> dict[str, Any]:
    first = {name: v[0] if isinstance(v, list) else v for name, v in judges.items()}
    return {name: verdict for name, verdict in first.items() if verdict in (1, 2)}


def _as_chat(row: _Row) -> _Row:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {
        name: [{"role": roles[name], "content": value}]
        if name in roles and isinstance(value, str)
        else value
        for name, value in row.items()
    }


def split(pairs: Sequence[KnownPair], sizes: Sizes, seed: int, path: str) -> Split:
    """Split pairs by prompt, so that all pairs of a prompt are in one part.

    Test and trusted pairs come from their share of the prompts, or from more if those have too few
    pairs. They are taken round-robin over prompts, since pairs of one prompt are correlated. The
    number of training pairs does not affect them.

    Raises:
        UsageError: there are too few pairs of at most `sizes.longest` characters.
    """
    groups: dict[str, list[KnownPair]] = {}
    for pair in pairs:
        if pair.length <= sizes.longest:
            groups.setdefault(pair.prompt, []).append(pair)
    waiting = Random(seed).sample(list(groups.values()), len(groups))

    def take(least_prompts: int, count: int) -> list[KnownPair]:
        taken: list[list[KnownPair]] = []
        while waiting and (len(taken) < least_prompts or sum(map(len, taken)) < count):
            taken.append(waiting.pop())
        return _round_robin(taken)[:count]

    test = take(round(TEST_PROMPTS * len(groups)), sizes.test)
    trusted = take(round(TRUSTED_PROMPTS * len(groups)), sizes.trusted)
    pool = _round_robin(waiting)
    if len(trusted) < sizes.trusted or len(pool) < LEAST_TRAIN:
        raise UsageError(
            f"{path}: {sum(map(len, groups.values()))} pairs of {len(groups)} prompts have at most "
            f"{sizes.longest} characters, too few for {sizes.test} test and {sizes.trusted} "
            "trusted pairs and a training set: lower --test_pairs or --trusted_pairs, or raise "
            "--longest."
        )
    return Split([pair.row for pair in test], [pair.row for pair in trusted], pool)


def _round_robin(groups: Sequence[Sequence[KnownPair]]) -> list[KnownPair]:
    """Return the first pair of every prompt, then the second pair of each, and so on."""
    turns = zip_longest(*groups)
    return [pair for turn in turns for pair in turn if pair is not None]


def training_rows(
    pool: Sequence[KnownPair], labels: str, most: int, seed: int, path: str
) -> list[_Row]:
    """Return training pairs with `is_flipped`; the responses of wrongly labelled ones are swapped.

    The share of flips is exact. The pairs that a seed flips at one rate are also flipped at higher
    rates.

    Args:
        pool: pairs for training.
        labels: `flips:RATE` or `judge:NAME`.
        most: maximum number of training pairs.
        seed: seed of the flips.
        path: name of the pairs in messages.

    Raises:
        UsageError: the file has no such judge.
    """
    kind, _, value = labels.partition(":")
    if kind == JUDGE:
        train = [pair for pair in pool if value in pair.mistaken][:most]
        names = sorted({name for pair in pool for name in pair.mistaken})
        if len(train) < LEAST_TRAIN:
            raise UsageError(
                f"--labels {labels}: {path} has {len(train)} pairs to train on with a verdict of "
                f"{value}; its judges are {', '.join(names) or 'none'}."
            )
        wrong = [pair.mistaken[value] for pair in train]
    else:
        train = list(pool[:most])
        order = Random(f"{seed} {FLIPS}").sample(range(len(train)), len(train))
        flipped = set(order[: round(float(value) * len(train))])
        wrong = [i in flipped for i in range(len(train))]
    return [_with_label(pair.row, is_wrong) for pair, is_wrong in zip(train, wrong, strict=True)]


def _with_label(row: _Row, is_flipped: bool) -> _Row:
    if is_flipped:
        row = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    return row | {"is_flipped": is_flipped}
