"""Opinions of reward models and judges about pairs, used as further signals.

Shapes: n pairs of a set.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.auditing.scores import ScoredSets
from softpref.data.column_cache import ColumnCache
from softpref.data.readers import dataset_rows
from softpref.data.sources import LoadedPairs, contents
from softpref.judging.ask import ask_judge
from softpref.judging.judge import account, account_text, judge_record
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Answer, Comparison, Judge, questions_of
from softpref.judging.responses import comparison_of_pair
from softpref.judging.scored import RewardModel
from softpref.models.reference import PART
from softpref.progress import Progress
from softpref.quantization import Bits
from softpref.training.evidence import OPINION, chunks

logger = logging.getLogger(__name__)

_BATCH_SIZE = 8
VERDICT_FILE = "verdicts.jsonl"


@dataclass(frozen=True)
class JudgeSummary:
    """A judge's part in an audit.

    Attributes:
        name: the judge's name as a signal.
        pairs: number of pairs that it was asked about.
        without_opinion: number of pairs without a verdict, because a call failed.
        record: the judge's options, how it was asked, and what its answers cost.
    """

    name: str
    pairs: int
    without_opinion: int
    record: dict[str, Any]


def with_opinions(
    sets: Sequence[LoadedPairs],
    reward_models: Iterable[str],
    cache: ColumnCache,
    ranks: Ranks = ALONE,
    bits: Bits | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[LoadedPairs, ...]:
    """Add one column per reward model to every set: the reward of chosen minus that of rejected.

    A pair that a model cannot score gets 0, no opinion. Rewards are cached by content and weights,
    so that neither a repeated audit nor `judge` computes them again. Ranks share the scoring.

    Raises:
        UsageError: there is no such reward model, or it cannot read a text.
    """
    extended = tuple(sets)
    for source in dict.fromkeys(reward_models):
        model = RewardModel(source, _BATCH_SIZE, cache, "--reward_model", ranks, bits, dtype)
        extended = tuple(
            replace(each, pairs=_with_opinion(each, model, source, ranks)) for each in extended
        )
    return extended


def _with_opinion(loaded: LoadedPairs, model: RewardModel, source: str, ranks: Ranks) -> Dataset:
    pairs, name = loaded.pairs, f"{source}, {loaded.source}"
    logger.info("%s: %d responses to score", name, 2 * len(pairs))
    numbers: list[float] = []
    with Progress(name, len(pairs), "pair", is_silent=not ranks.is_first) as bar:
        try:
            for part in chunks(pairs, PART):
                for found in _differences(part, model):
                    numbers += found
                    bar.update(len(found))
        finally:
            model.finish()
    opinion = torch.tensor(numbers, dtype=torch.float64)
    if unscored := int((~opinion.isfinite()).sum()):
        logger.warning("%s: could not score %d pairs (too long or unreadable)", name, unscored)
    return pairs.add_column(OPINION + source, opinion.nan_to_num(0.0, 0.0, 0.0).numpy())


def _differences(pairs: Dataset, model: RewardModel) -> Iterator[list[float]]:
    """Yield the differences of rewards, batch by batch; NaN is no opinion."""
    by_uid = questions_of(_comparisons(pairs), "both", 0)
    questions = [as_labelled for as_labelled, _ in by_uid.values()]
    for start in range(0, len(questions), model.batch_size):
        answers = model.differences(questions[start : start + model.batch_size])
        yield [math.nan if isinstance(each, Answer) else each for each in answers]


def with_verdicts(
    scored: ScoredSets, judge: Judge, options: JudgeOptions, output: Path
) -> tuple[ScoredSets, JudgeSummary]:
    """Add a column with a judge's mean verdict on `chosen`, in [−1, 1], to both sets.

    A pair with a failed call gets 0, no opinion. Each verdict is stored in `output` as it arrives,
    so that the judge is never asked twice.

    Raises:
        UsageError: as in `ask_judge`.
    """
    sets = {"audited": scored.pairs, "trusted": scored.clean}
    comparisons = [each for name, pairs in sets.items() for each in _comparisons(pairs, f"{name} ")]
    task = f"judging pairs of {scored.source} and {scored.clean_source}"
    with VerdictLog(output / VERDICT_FILE) as log:
        judged = ask_judge(comparisons, judge, options, log, task)
    name = f"judge {options.judge_model or options.judge}"
    logger.info("%s: %s", name, account_text(judged))
    failed = sum(outcome.result == "failed" for outcome in judged.outcomes)
    record = judge_record(judge, options) | {
        "account": account(judged),
        "pairs": len(comparisons),
        "without_opinion": failed,
        "changed_with_order": sum(outcome.flipped for outcome in judged.outcomes),
    }
    verdicts = torch.tensor(judged.mean_verdicts, dtype=torch.float64)
    parts = verdicts.split([*map(len, sets.values())])
    pairs, clean = (
        each.add_column(OPINION + name, part.numpy())
        for each, part in zip(sets.values(), parts, strict=True)
    )
    summary = JudgeSummary(name, len(comparisons), failed, record)
    return replace(scored, pairs=pairs, clean=clean), summary


def _comparisons(pairs: Dataset, prefix: str = "") -> Iterator[Comparison]:
    rows = dataset_rows(contents(pairs))
    for uid, row in zip(pairs["uid"], rows, strict=True):
        yield comparison_of_pair(prefix + uid, row)
