"""What calls will cost, from the tokens that the endpoint counted for the first of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from softpref.judging.account import Account
from softpref.statistics.win_rate import student_97_5

SAMPLE_CALLS = 20
"""Calls, spread over all questions, whose tokens are measured first."""
_LEAST = SAMPLE_CALLS // 2  # calls with a count


@dataclass(frozen=True)
class CountedCall:
    """A call that was made.

    Attributes:
        size: characters of the question.
        input_tokens: as counted by the endpoint, over all calls for the question.
        output_tokens: likewise.
    """

    size: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Forecast:
    """The tokens and dollars of calls to come, each with the half-width of its 95% interval."""

    input_tokens: tuple[float, float]
    output_tokens: tuple[float, float]
    dollars: tuple[float, float] | None


def forecast(
    sample: Sequence[CountedCall], sizes: Sequence[int], account: Account
) -> Forecast | None:
    """Return a forecast of questions of these sizes; None if too few calls were counted.

    Input tokens are taken to be in proportion to a question's size, output tokens not to depend on
    it. The intervals hold the error of the sample and the deviation of the calls to come.
    """
    sample = [call for call in sample if call.input_tokens > 0]
    if len(sample) < _LEAST:
        return None
    ratio = sum(c.input_tokens for c in sample) / sum(c.size for c in sample)
    mean = statistics.fmean(c.output_tokens for c in sample)
    inputs, outputs = ratio * sum(sizes), mean * len(sizes)
    residuals = [(c.input_tokens - ratio * c.size, c.output_tokens - mean) for c in sample]
    total = account.dollars(inputs, outputs)
    costs = [account.dollars(*each) or 0.0 for each in residuals]
    margins = [_margin(each, len(sizes)) for each in (*zip(*residuals, strict=True), costs)]
    return Forecast(
        (inputs, margins[0]), (outputs, margins[1]), None if total is None else (total, margins[2])
    )


def _margin(residuals: Sequence[float], calls: int) -> float:
    student = student_97_5(len(residuals) - 1)
    variance = statistics.variance(residuals)
    return student * math.sqrt(variance * calls * (1 + calls / len(residuals)))


def spread(count: int) -> list[int]:
    """Return an order of questions whose first `SAMPLE_CALLS` are spread over all of them."""
    first = sorted({i * count // SAMPLE_CALLS for i in range(SAMPLE_CALLS)}) if count else []
    taken = set(first)
    return first + [i for i in range(count) if i not in taken]
