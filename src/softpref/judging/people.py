"""People's verdicts on compared pairs, and the win rate that they would give."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from softpref.data.bad_rows import place
from softpref.data.messages import as_text
from softpref.errors import UsageError
from softpref.judging.check import load_verdicts
from softpref.judging.outcomes import Outcome
from softpref.judging.questions import Comparison
from softpref.judging.template import prompt_key
from softpref.statistics.people_rate import PeopleRate, people_rate

logger = logging.getLogger(__name__)

_UNLIKE = 3.0  # standard errors
_Pair = tuple[str, frozenset[str]]


@dataclass(frozen=True)
class PeoplesVerdicts:
    """People's verdicts by content: on each pair, the better response, or None for a tie."""

    source: str
    by_pair: Mapping[_Pair, Sequence[str | None]]

    def of(self, comparison: Comparison) -> tuple[float, float] | None:
        """Return the shares of wins and losses in the verdicts on a comparison, if any."""
        verdicts = self.by_pair.get(_pair(comparison))
        if not verdicts:
            return None
        response, baseline = _shown(comparison)
        return fmean(v == response for v in verdicts), fmean(v == baseline for v in verdicts)

    def announce(self, contests: Iterable[Sequence[Comparison]]) -> None:
        """Log how many rows are about compared pairs.

        Raises:
            UsageError: none is.
        """
        compared = {_pair(each) for comparisons in contests for each in comparisons}
        rows = sum(map(len, self.by_pair.values()))
        known = [verdicts for pair, verdicts in self.by_pair.items() if pair in compared]
        used = sum(map(len, known))
        if not used:
            raise UsageError(
                f"--human {self.source}: none of its {rows:,} rows is about a compared pair: "
                "prompt and both responses must be those of --responses and --baseline."
            )
        repeated = sum(len(verdicts) > 1 for verdicts in known)
        several = f", {repeated:,} of them judged several times and averaged" if repeated else ""
        logger.info(
            f"--human {self.source}: {used:,} of {rows:,} rows are about compared pairs "
            f"({len(known):,} pairs{several}); the other {rows - used:,} rows are not used"
        )


def load_people(source: str) -> PeoplesVerdicts:
    """Return people's verdicts from a file in the form of `judge --check`.

    Raises:
        UsageError: as in `load_verdicts`, or one of two equal responses is the better one.
    """
    better, tied = load_verdicts(source)
    found: dict[_Pair, list[str | None]] = {}
    for pair in better:
        response, baseline = _shown(pair)
        if response == baseline:
            raise UsageError(
                f"{place(source, int(pair.uid))}: both responses are equal and `gold` prefers "
                "one; write tie, or remove the row."
            )
        found.setdefault(_pair(pair), []).append(response)
    for pair in tied:
        found.setdefault(_pair(pair), []).append(None)
    return PeoplesVerdicts(source, found)


def rate_by_people(
    comparisons: Sequence[Comparison], outcomes: Sequence[Outcome], people: PeoplesVerdicts
) -> PeopleRate | None:
    """Return the win rate that people would give; None without their verdicts on these pairs.

    Args:
        comparisons: the comparisons.
        outcomes: the judge's, in the same order.
        people: verdicts on a random sample of the comparisons.
    """
    verdicts = {i: said for i, each in enumerate(comparisons) if (said := people.of(each))}
    if not verdicts:
        return None
    return people_rate(
        torch.tensor(list(verdicts.values()), dtype=torch.float64),
        torch.tensor(list(verdicts)),
        torch.tensor([[o.result == side for side in ("win", "loss")] for o in outcomes]).double(),
        [outcome.prompt for outcome in outcomes],
    )


def people_remarks(rate: PeopleRate, asked: int) -> list[str]:
    """Return what a reader must know about the rate.

    Args:
        rate: the rate.
        asked: number of comparisons in its contest.
    """
    remarks = []
    if rate.verdicts == asked:
        remarks.append("people judged every pair, so the rate is theirs alone")
    elif not rate.judge_weight:
        remarks.append(
            "the judge adds nothing to these verdicts, or they are too few to show it, so the rate "
            "is people's alone"
        )
    else:
        remarks.append(
            f"with the judge, {rate.verdicts:,} verdicts of people are worth {rate.worth:,.0f}"
        )
    if abs(rate.unlike) > _UNLIKE:
        remarks.append(
            "**not a random sample**: the judge's mean verdict on the pairs that people judged is "
            f"{abs(rate.unlike):.1f} standard errors from that on all; draw them at random"
        )
    return remarks


def _pair(comparison: Comparison) -> _Pair:
    return prompt_key(comparison), frozenset(_shown(comparison))


def _shown(comparison: Comparison) -> tuple[str, str]:
    return as_text(comparison.response).strip(), as_text(comparison.baseline).strip()
