"""Real pairs whose truth is known: read, split by prompt, and given labels that may be wrong."""

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

from datasets import Dataset

from softpref.data.bad_rows import place
from softpref.data.messages import Text, texts_of
from softpref.data.readers import dataset_rows, read_rows
from softpref.data.sources import CONTENT, load_pairs, pairs_from_dataset
from softpref.errors import UsageError

FLIPS, JUDGE = "flips", "judge"
TEST_PROMPTS, TRUSTED_PROMPTS = 0.3, 0.2
"""Shares of a file's prompts; the rest is trained on."""
LEAST_TRAIN = 8
"""Training pairs without which a cell is refused: one batch."""
_Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How many pairs a cell has, and how long they are.

    Attributes:
        trusted: pairs with right labels beside the training pairs.
        train: most training pairs.
        test: held-out pairs with right labels.
        longest: most characters of prompt and both responses together.
    """

    trusted: int
    train: int
    test: int
    longest: int


@dataclass(frozen=True)
class KnownPair:
    """A pair with the better response as `chosen`.

    Attributes:
        row: `uid`, prompt, responses and what a chat template is given beside them.
        mistaken: whether a judge took the other response for the better one, by its name.
    """

    row: _Row
    mistaken: Mapping[str, bool]

    @property
    def prompt(self) -> str:
        """The prompt as a name."""
        return json.dumps(self.row["prompt"])

    @property
    def length(self) -> int:
        """Characters of prompt and both responses."""
        return sum(characters(self.row[name]) for name in ("prompt", "chosen", "rejected"))


@dataclass(frozen=True)
class Split:
    """Pairs of one file in three parts that share no prompt; `pool` is what may be trained on."""

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
    """Return what says where labels come from in its one spelling.

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
            "judge of the files' column `judges`."
        )
    return f"{FLIPS}:{rate:g}"


def load_known_pairs(path: str, *, as_chat: bool) -> list[KnownPair]:
    """Read a file's pairs, the better response chosen.

    Rows are preference pairs whose labels are right, or have `response_1`, `response_2` and `gold`,
    1 or 2; then `judges` may say by name which of the two each judge preferred: 1 or 2, of a list
    the first, null where it did not decide.

    Args:
        path: what `load_pairs` reads.
        as_chat: put plain texts as a user's and an assistant's messages.

    Raises:
        UsageError: a row cannot be read.
    """
    _, first = next(read_rows(path), (0, None))
    if isinstance(first, dict) and "gold" in first:
        rows, mistaken = _by_gold(path)
        loaded = pairs_from_dataset(Dataset.from_list(rows), path)
    else:
        loaded = load_pairs(path)
        mistaken = [{}] * len(loaded.pairs)
    if {"is_flipped", "soft_label"} & set(loaded.pairs.column_names):
        raise UsageError(
            f"{path} has is_flipped or soft_label, and study --preset real makes labels of its "
            "own: give the pairs as they were before."
        )
    pairs = [
        {name: row[name] for name in ("uid", *CONTENT) if row.get(name) is not None}
        for row in dataset_rows(loaded.pairs)
    ]
    if as_chat:
        pairs = [_as_chat(row) for row in pairs]
    return [KnownPair(row, said) for row, said in zip(pairs, mistaken, strict=True)]


def _by_gold(path: str) -> tuple[list[_Row], list[dict[str, bool]]]:
    rows, mistaken = [], []
    for number, raw in read_rows(path):
        try:
            gold = raw["gold"]  # type: ignore[index]
            better, worse = raw[f"response_{gold}"], raw[f"response_{3 - gold}"]  # type: ignore[index]
            said = _first_verdicts(raw.get("judges") or {})  # type: ignore[attr-defined]
            rows.append({"prompt": raw["prompt"], "chosen": better, "rejected": worse})  # type: ignore[index]
        except (KeyError, TypeError, AttributeError, IndexError):
            raise UsageError(
                f"{place(path, number)}: give prompt, response_1, response_2, gold (1 or 2) and, "
                "for judge:NAME, judges as {NAME: 1 or 2}."
            ) from None
        mistaken.append({name: verdict != gold for name, verdict in said.items()})
    return rows, mistaken


def _first_verdicts(judges: Mapping[str, Any]) -> dict[str, Any]:
    first = {name: said[0] if isinstance(said, list) else said for name, said in judges.items()}
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
    """Split pairs by prompt: a prompt's pairs lie in one part alone.

    Test and trusted pairs are of as many prompts as their share, or more where so many do not have
    enough pairs, and take one of each prompt by turns: pairs of one prompt tell less. How many are
    trained on changes neither.

    Raises:
        UsageError: there are too few of at most `sizes.longest` characters.
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
        return _by_turns(taken)[:count]

    test = take(round(TEST_PROMPTS * len(groups)), sizes.test)
    trusted = take(round(TRUSTED_PROMPTS * len(groups)), sizes.trusted)
    pool = _by_turns(waiting)
    if len(trusted) < sizes.trusted or len(pool) < LEAST_TRAIN:
        raise UsageError(
            f"{path}: {sum(map(len, groups.values()))} pairs of {len(groups)} prompts have at most "
            f"{sizes.longest} characters, too few for {sizes.test} test and {sizes.trusted} "
            "trusted pairs and some to train on: lower --test_pairs or --trusted_pairs, or raise "
            "--longest."
        )
    return Split([pair.row for pair in test], [pair.row for pair in trusted], pool)


def _by_turns(groups: Sequence[Sequence[KnownPair]]) -> list[KnownPair]:
    """Return the first pair of every prompt, then the second of each that has one, and so on."""
    turns = zip_longest(*groups)
    return [pair for turn in turns for pair in turn if pair is not None]


def training_rows(
    pool: Sequence[KnownPair], labels: str, most: int, seed: int, path: str
) -> list[_Row]:
    """Return at most so many training pairs, the responses of wrong ones swapped, `is_flipped`.

    The share of flips is exact; what a seed flips at low rates it flips at higher ones too.

    Args:
        pool: what may be trained on.
        labels: `flips:RATE` or `judge:NAME`.
        most: training pairs.
        seed: of the flips.
        path: what messages call the pairs.

    Raises:
        UsageError: the judge is not one of the file's.
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
    return [_given(pair.row, is_wrong) for pair, is_wrong in zip(train, wrong, strict=True)]


def _given(row: _Row, is_flipped: bool) -> _Row:
    if is_flipped:
        row = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    return row | {"is_flipped": is_flipped}
