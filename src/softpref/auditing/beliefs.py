"""From evidence to what an audit says: each pair's probability, rank and flag; the set's sum.

Shapes: n audited pairs, m trusted pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from softpref.models.scoring import token_counts
from softpref.statistics.calibration import expected_calibration_error, share_of_equals
from softpref.statistics.evidence import Evidence
from softpref.statistics.fluency_curve import Curve
from softpref.training.metrics import auroc

_BINS = 10
SUSPECT, UNSURE = 0.5, 0.8
"""Below the first a label is more likely wrong than right; below the second it is worth a look."""
CLEAR_FALL = 0.1
"""Of the share of right preferences, as they become stronger."""


@dataclass(frozen=True)
class Beliefs:
    """What an audit believes of every pair.

    Attributes:
        p_correct: (n,) the probability that the label is right, float64.
        rank: (n,) 1 for the most suspect pair.
        speaks: whether evidence tells right labels from wrong ones at all.
        is_misled: whether fluency is all that is believed, and the model is surest of what it gets
            wrong.
        trusted_auroc: how often a trusted pair as given has more evidence than one swapped, by
            fits that left it out.
        ece: calibration error of `p_correct` on trusted pairs that its fit left out.
        reliability: for each of ten bins of these the mean stated probability, the share that was
            right, and how many they are.
        doubted_clean: places of trusted pairs whose label evidence contradicts most surely.
    """

    p_correct: Tensor
    rank: Tensor
    speaks: bool
    is_misled: bool
    trusted_auroc: float
    ece: float
    reliability: list[dict[str, float]]
    doubted_clean: list[int]


def believe(evidence: Evidence, log_odds: Tensor, rate: Tensor) -> Beliefs:
    """Return the beliefs about pairs of these log-odds g, nats, and flip rates ε, (n,) each."""
    rank = torch.empty(len(log_odds), dtype=torch.int64)
    suspicion = log_odds + torch.log1p(-rate) - rate.log()
    rank[suspicion.argsort(stable=True)] = torch.arange(1, len(log_odds) + 1)
    trusted = evidence.trusted
    right = (trusted * evidence.speaks).sigmoid()
    stated = torch.cat([right, 1 - right])
    is_right = torch.arange(len(stated)) < len(right)
    return Beliefs(
        evidence.probability_correct(log_odds, rate),
        rank,
        evidence.speaks,
        _falls(evidence.curve) and not evidence.theta[1:].any(),
        auroc(torch.cat([trusted, -trusted]), is_right),
        expected_calibration_error(stated, is_right, _BINS),
        reliability(stated, is_right),
        [i for i in right.argsort(stable=True).tolist() if right[i] < 1 - UNSURE],
    )


def _falls(curve: Curve) -> bool:
    """Return whether stronger preferences are clearly less often right than weaker ones."""
    if not len(curve.knots):
        return False
    right = curve.log_odds(curve.knots).sigmoid()
    return float((right.cummax(0).values - right).max()) > CLEAR_FALL


def reliability(stated: Tensor, is_right: Tensor) -> list[dict[str, float]]:
    """Return stated probability and share right, by bins of equally many."""
    bins = stated.argsort(stable=True).tensor_split(_BINS)
    share = share_of_equals(stated, is_right)
    return [
        {
            "stated": float(stated[some].mean()),
            "right": float(share[some].mean()),
            "pairs": len(some),
        }
        for some in bins
        if len(some)
    ]


def flag(p_correct: float) -> str:
    """Return `suspect`, `unsure` or `fine`."""
    return "suspect" if p_correct < SUSPECT else "unsure" if p_correct < UNSURE else "fine"


def longer_is_chosen(pairs: Dataset) -> float:
    """Return the share of pairs, (n,), whose longer response is the one labelled better.

    In tokens; pairs of equally long ones count half.
    """
    by = _longer_by(pairs)
    return float(((by > 0).double() + (by == 0) / 2).mean())


def length_auroc(trusted: Dataset) -> float:
    """Return how well length alone tells trusted pairs as given from swapped ones.

    In tokens; as "longer is better" or "shorter is better", whichever does better.
    """
    by = _longer_by(trusted)
    share = auroc(torch.cat([by, -by]), torch.arange(2 * len(by)) < len(by))
    return max(share, 1 - share)


def _longer_by(pairs: Dataset) -> Tensor:
    return token_counts(pairs, "chosen_ids") - token_counts(pairs, "rejected_ids")
