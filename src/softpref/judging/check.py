"""The judge measured: on pairs of which the better response is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softpref.data.bad_rows import place
from softpref.data.readers import RowError, read_rows
from softpref.errors import UsageError
from softpref.evaluation.win_rate import wilson_interval
from softpref.judging.ask import Judged
from softpref.judging.questions import Comparison
from softpref.judging.rates import Interval


@dataclass(frozen=True)
class JudgeQuality:
    """How good a judge is; shares in [0, 1] with Wilson's 95% intervals.

    Attributes:
        pairs: how many were asked about.
        accuracy: right verdicts of all that decided; None where nothing was decided.
        accuracy_interval: its interval.
        right: share of all pairs with a right verdict, ties and failures counting against it.
        ties: share of pairs called a tie, those whose verdict changed with the order among them.
        flipped: share whose verdict changed with the order.
        first_share: how often A was preferred, of all verdicts but ties; 0.5 is no bias.
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
    """Return each pair as a comparison whose response is the better one.

    Rows have `prompt`, `response_1`, `response_2` and `gold`, 1 or 2; or `prompt`, `chosen` and
    `rejected`, of which the chosen one is taken to be the better.

    Raises:
        UsageError: the file cannot be read, or a row is not so.
    """
    found = [_comparison(source, row, values) for row, values in read_rows(source)]
    if not found:
        raise UsageError(f"--check {source}: holds no row.")
    return found


def _comparison(source: str, row: int, values: Any) -> Comparison:
    if isinstance(values, RowError) or not isinstance(values, dict):
        why = values if isinstance(values, RowError) else "not an object"
        raise UsageError(f"{place(source, row)}: {why}; fix or remove it.")
    texts = _texts(values)
    if texts is None or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(
            f"{place(source, row)}: give prompt, response_1, response_2 and gold (1 or 2), or "
            "prompt, chosen and rejected, all text."
        )
    return Comparison(f"{row}", *texts)


def _texts(values: Mapping[str, Any]) -> tuple[Any, Any, Any] | None:
    """Return prompt, better and worse response."""
    if "gold" not in values:
        return values.get("prompt"), values.get("chosen"), values.get("rejected")
    responses = (values.get("response_1"), values.get("response_2"))
    gold = str(values["gold"]).removesuffix(".0")  # as Parquet may have it
    if gold not in ("1", "2"):
        return None
    better, worse = responses if gold == "1" else responses[::-1]
    return values.get("prompt"), better, worse


def judge_quality(judged: Judged) -> JudgeQuality:
    """Return how a judge did on comparisons whose response is the better one."""
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
