"""What reward models say of pairs: further signals, weighed like any other.

Shapes: n pairs of a set.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from softpref.data.messages import CONTEXT, as_text
from softpref.data.readers import dataset_rows
from softpref.data.sources import LoadedPairs, contents
from softpref.judging.questions import Answer, Question
from softpref.judging.scored import RewardModel
from softpref.training.evidence import OPINION
from softpref.training.output import read_columns, write_columns
from softpref.training.reference import PART, default_cache

logger = logging.getLogger(__name__)

PAIRS_AT_ONCE = 8


def with_opinions(
    sets: Sequence[LoadedPairs], reward_models: Iterable[str]
) -> tuple[LoadedPairs, ...]:
    """Add a column for each reward model to every set: the reward of chosen less that of rejected.

    A pair that a model cannot score has 0, no opinion. Rewards are kept on disk by content and
    weights, in parts, so that a repeated audit asks for none of them again.

    Raises:
        UsageError: there is no such reward model, or it cannot read a text.
    """
    found = tuple(sets)
    for source in dict.fromkeys(reward_models):
        model = RewardModel(source, PAIRS_AT_ONCE, "--reward_model")
        found = tuple(
            replace(each, pairs=_with_opinion(each.pairs, model, source)) for each in found
        )
    return found


def _with_opinion(pairs: Dataset, model: RewardModel, source: str) -> Dataset:
    parts = [
        _opinion(pairs.select(range(start, min(start + PART, len(pairs)))), model, source)
        for start in range(0, len(pairs), PART)
    ]
    return pairs.add_column(OPINION + source, torch.cat(parts).numpy())


def _opinion(pairs: Dataset, model: RewardModel, source: str) -> Tensor:
    """Return the differences of rewards, (n,), from disk or by asking."""
    rows = list(dataset_rows(contents(pairs)))
    asked = json.dumps([model.identity["weights"], rows], sort_keys=True)
    key = hashlib.sha256(asked.encode()).hexdigest()[:32]
    path = default_cache().parent / "opinions" / f"{key}.safetensors"
    kept = read_columns(path, ["opinion"], len(pairs))
    if kept is not None:
        return kept["opinion"]
    questions = [_question(uid, row) for uid, row in zip(pairs["uid"], rows, strict=True)]
    logger.info("%s: %d responses to score", source, 2 * len(questions))
    answers = [
        answer
        for start in range(0, len(questions), PAIRS_AT_ONCE)
        for answer in model.differences(questions[start : start + PAIRS_AT_ONCE])
    ]
    opinion = torch.tensor(
        [math.nan if isinstance(answer, Answer) else answer for answer in answers],
        dtype=torch.float64,
    )
    silent = int((~opinion.isfinite()).sum())
    if silent:
        logger.warning("%s: no opinion of %d pairs, too long or unreadable for it", source, silent)
        opinion = opinion.nan_to_num(0.0, 0.0, 0.0)
    write_columns(path, {"opinion": opinion})
    return opinion


def _question(uid: str, row: dict[str, Any]) -> Question:
    context = {name: row[name] for name in CONTEXT if row.get(name) is not None}
    return Question(
        uid, row["prompt"], as_text(row["chosen"]), as_text(row["rejected"]), False, context
    )
