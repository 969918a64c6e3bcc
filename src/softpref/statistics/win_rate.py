"""Win rates with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL_97_5 = 1.959963984540054
"""The standard normal's 97.5% quantile."""


@dataclass(frozen=True)
class WinRate:
    """Share of decided comparisons that were won, with its 95% interval.

    `rate` is None, and the interval all of [0, 1], where no comparison was decided.
    """

    rate: float | None
    low: float
    high: float


def win_rate(scores: Sequence[float], baseline_scores: Sequence[float]) -> WinRate:
    """Return how often the scores beat the baseline's on the same prompts, excluding ties.

    The interval is Wilson's (1927): (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n).

    Args:
        scores: one per prompt, higher is better.
        baseline_scores: the baseline's on the same prompts, in the same order.

    Raises:
        ValueError: the lengths differ, or a score is NaN.
    """
    if any(map(math.isnan, (*scores, *baseline_scores))):
        raise ValueError("a NaN among the scores wins, loses and ties with nothing")
    pairs = list(zip(scores, baseline_scores, strict=True))
    wins = sum(score > baseline for score, baseline in pairs)
    losses = sum(score < baseline for score, baseline in pairs)
    low, high = wilson_interval(wins, wins + losses)
    return WinRate(wins / (wins + losses) if wins + losses else None, low, high)


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share; [0, 1] where nothing was tried."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, NORMAL_97_5**2
    centre = share + z2 / (2 * trials)
    spread = NORMAL_97_5 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    whole = 1 + z2 / trials
    return max(0.0, (centre - spread) / whole), min(1.0, (centre + spread) / whole)


def student_97_5(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t, to 0.1% from 5 degrees of freedom on.

    By Cornish–Fisher's series in 1 / freedom (Abramowitz & Stegun 26.7.5).
    """
    z = NORMAL_97_5
    series = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(part / freedom**power for power, part in enumerate(series, 1))
