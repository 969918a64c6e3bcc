"""Turn evidence into each pair's probability, rank and flag, and check them on trusted pairs.

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
"""Labels below the first probability are probably wrong; those below the second need review."""
CLEAR_FALL = 0.1
"""A clear drop in the share of right labels from weaker to stronger preferences."""


@dataclass(frozen=True)
class PairBeliefs:
    """What an audit believes about the pairs of a set.

    Attributes:
        p_correct: (n,) the probability that the label is right, float64.
        rank: (n,) 1 for the most suspect pair.
        speaks: whether evidence distinguishes right labels from wrong ones at all.
        is_misled: whether fluency is the only evidence used, and the model's strongest preferences
            are wrong more often than its weaker ones.
        trusted_auroc: how often a trusted pair as given has more evidence than a swapped one, in
            cross-validation.
        ece: cross-validated calibration error of `p_correct` on trusted pairs.
        reliability: mean stated probability, share of right labels and count for each of ten bins.
        doubted_clean: indices of trusted pairs whose label evidence contradicts most clearly.
    """

    p_correct: Tensor
    rank: Tensor
    speaks: bool
    is_misled: bool
    trusted_auroc: float
    ece: float
    reliability: list[dict[str, float]]
    doubted_clean: list[int]


def pair_beliefs(evidence: Evidence, log_odds: Tensor, rate: Tensor) -> PairBeliefs:
    """Return the beliefs about pairs with log-odds g, nats, and flip rates ε, (n,) each."""
    rank = torch.empty(len(log_odds), dtype=torch.int64)
    suspicion = log_odds + torch.log1p(-rate) - rate.log()
    rank[suspicion.argsort(stable=True)] = torch.arange(1, len(log_odds) + 1)
    trusted = evidence.trusted
    right = (trusted * evidence.speaks).sigmoid()
    stated = torch.cat([right, 1 - right])
    is_right = torch.arange(len(stated)) < len(right)
    return PairBeliefs(
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
    """Return whether stronger preferences are right clearly less often than weaker ones."""
    if not len(curve.knots):
        return False
    right = curve.log_odds(curve.knots).sigmoid()
    return float((right.cummax(0).values - right).max()) > CLEAR_FALL


def reliability(stated: Tensor, is_right: Tensor) -> list[dict[str, float]]:
    """Return stated probability and share of right labels in bins of equal size."""
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

    Length is in tokens; a tie counts half.
    """
    by = _length_difference(pairs)
    return float(((by > 0).double() + (by == 0) / 2).mean())


def length_auroc(trusted: Dataset) -> float:
    """Return how well length alone separates trusted pairs as given from swapped ones.

    Length is in tokens; the better of "longer is better" and "shorter is better" counts.
    """
    by = _length_difference(trusted)
    share = auroc(torch.cat([by, -by]), torch.arange(2 * len(by)) < len(by))
    return max(share, 1 - share)


def _length_difference(pairs: Dataset) -> Tensor:
    return token_counts(pairs, "chosen_ids") - token_counts(pairs, "rejected_ids")
