"""Measure a judge on pairs whose better response is known."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softpref.columns import STANDARD
from softpref.data.bad_rows import place
from softpref.data.label_columns import is_tie
from softpref.data.messages import Text, is_empty, parse_text
from softpref.data.noise import refuse_bad_rows
from softpref.data.readers import RowError, dataset_rows
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.judging.ask import Judged
from softpref.judging.questions import Comparison
from softpref.judging.rates import Interval
from softpref.judging.responses import Prompt, comparison_of_pair, plain_reply, prompt_of, rows_of
from softpref.statistics.win_rate import wilson_interval

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgeQuality:
    """The quality of a judge; shares in [0, 1] with Wilson's 95% intervals.

    Attributes:
        pairs: number of pairs.
        accuracy: share of correct verdicts, without ties and failures; None if there are none.
        accuracy_interval: its interval.
        right: share of pairs with a correct verdict, ties and failures included.
        ties: share of ties, including verdicts that changed with the order.
        flipped: share of pairs whose verdict changed with the order.
        first_share: share of verdicts for A, without ties; 0.5 means no position bias.
        failed: share of pairs with a failed call.
        failed_interval: its interval.
    """

    pairs: int
    accuracy: float | None
    accuracy_interval: Interval
    right: float
    ties: float
    flipped: float
    first_share: float | None
    failed: float
    failed_interval: Interval


def load_gold(source: str) -> list[Comparison]:
    """Return each pair with a better response as a comparison whose response is the better one.

    Raises:
        UsageError: as in `load_verdicts`, or all pairs are ties.
    """
    better, tied = load_verdicts(source)
    if not better:
        raise UsageError(
            f"{source}: every pair is a tie, which cannot measure a judge: add pairs whose better "
            "response is known."
        )
    if tied:
        logger.info(f"{source}: the judge is not asked about {len(tied):,} pairs that are ties")
    return better


def load_verdicts(source: str) -> tuple[list[Comparison], list[Comparison]]:
    """Return the pairs of which one response is better, as a comparison's response, and the ties.

    Rows have `prompt`, `response_1`, `response_2` and `gold` (1, 2 or tie); or they are training
    pairs, whose chosen response counts as the better one unless `label` is tie; where `is_flipped`,
    as `softpref inject` writes it, the rejected one does. Prompts and responses are text or
    messages, optionally with `tools` and `chat_template_kwargs`.

    Raises:
        UsageError: the file cannot be read, or a row has another form.
    """
    if any(values.get("gold") is not None for _, values in rows_of(source)):
        found = [_comparison(source, row, values) for row, values in rows_of(source)]
        return [pair for pair, gold in found if gold != "tie"], [
            pair for pair, gold in found if gold == "tie"
        ]
    loaded = load_pairs(source, on_bad_row="skip")
    refuse_bad_rows(loaded.bad_rows, "Fix or remove it")
    better, tied, flipped = list[Comparison](), list[Comparison](), 0
    for row in dataset_rows(loaded.pairs):
        is_flipped = bool(row.get("is_flipped")) and not is_tie(row)
        flipped += is_flipped
        pair = STANDARD.swapped(row) if is_flipped else row
        (tied if is_tie(pair) else better).append(comparison_of_pair(str(pair["row"]), pair))
    if flipped:
        logger.info(f"{source}: {flipped:,} pairs with is_flipped are swapped back")
    return better, tied


def _comparison(source: str, row: int, values: Mapping[str, Any]) -> tuple[Comparison, str]:
    given = prompt_of(source, row, values)
    gold = str(values.get("gold")).removesuffix(".0")  # Parquet may store it as a float
    try:
        if gold not in ("1", "2", "tie"):
            raise RowError("give prompt, response_1, response_2 and gold (1, 2 or tie)")
        numbers = (2, 1) if gold == "2" else (1, 2)
        first, second = (_response(values, f"response_{number}", given) for number in numbers)
        json.dumps([first, second])
    except (ValueError, TypeError, RecursionError) as error:  # Parquet may contain dates
        raise UsageError(f"{place(source, row)}: {error}; fix or remove it.") from None
    return Comparison(str(row), given.prompt, first, second, given.context), gold


def _response(values: Mapping[str, Any], column: str, given: Prompt) -> Text:
    if values.get(column) is None:
        raise RowError(f"{column} is missing")
    response = parse_text(values[column], column)
    if is_empty(response):
        raise RowError(f"{column} is empty")
    if isinstance(given.prompt, str) and not isinstance(response, str):
        raise RowError(f"the prompt is text and {column} is messages: give both as messages")
    return plain_reply(response)


def judge_quality(judged: Judged) -> JudgeQuality:
    """Return a judge's quality on comparisons whose response is the better one."""
    results = [outcome.result for outcome in judged.outcomes]
    count, right, wrong = len(results), results.count("win"), results.count("loss")
    failed = results.count("failed")
    return JudgeQuality(
        pairs=count,
        accuracy=right / (right + wrong) if right + wrong else None,
        accuracy_interval=wilson_interval(right, right + wrong),
        right=right / count,
        ties=results.count("tie") / count,
        flipped=sum(outcome.flipped for outcome in judged.outcomes) / count,
        first_share=judged.first_share,
        failed=failed / count,
        failed_interval=wilson_interval(failed, count),
    )
