"""From scores to what an audit says: each pair's probability, rank, flag and reason; the set's sum.

Shapes: n audited pairs, m trusted pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from softpref.algorithm.calibration import expected_calibration_error, share_of_equals
from softpref.algorithm.noise_rate import NoiseRate
from softpref.auditing.agreement import Agreement, left_out
from softpref.training.scoring import token_counts

FOLDS, BINS = 5, 10
SUSPECT, UNSURE = 0.5, 0.8
"""Below the first a label is more likely wrong than right; below the second it is worth a look."""
SEED = 0
"""Of the deal into folds."""


@dataclass(frozen=True)
class Beliefs:
    """What an audit believes of every pair.

    Attributes:
        p_correct: (n,) the probability that the label is right, float64.
        preference_right: (n,) how often a preference as strong as the model's is right, (0, 1).
        is_rising: whether stronger preferences were taken to be right no less often.
        rank: (n,) 1 for the most suspect pair.
        ece: calibration error of `p_correct` on trusted pairs that its fit left out.
        reliability: for each of ten bins of these the mean stated probability, the share that was
            right, and how many they are.
        doubted_clean: places of trusted pairs whose label the model contradicts most surely.
    """

    p_correct: Tensor
    preference_right: Tensor
    is_rising: bool
    rank: Tensor
    ece: float
    reliability: list[dict[str, float]]
    doubted_clean: list[int]


def believe(ppl_diff: Tensor, clean_ppl_diff: Tensor, noise: NoiseRate) -> Beliefs:
    """Return the beliefs about pairs of these PPLDiffs, nats per token, (n,) and (m,)."""
    scores, clean = -ppl_diff.double(), -clean_ppl_diff.double()
    agreement = Agreement.fit(scores, clean, noise.expected)
    p_correct = agreement.probability_correct(scores, noise.expected)
    by_score = scores.argsort(stable=True)  # which orders pairs of one probability
    order = by_score[p_correct[by_score].argsort(stable=True)]
    rank = torch.empty(len(scores), dtype=torch.int64)
    rank[order] = torch.arange(1, len(scores) + 1)
    right = left_out(scores, clean, noise.expected, min(FOLDS, len(clean)), SEED)
    stated = torch.cat([right, 1 - right])
    is_right = torch.arange(len(stated)) < len(right)
    return Beliefs(
        p_correct,
        agreement.probability_right(scores.abs()),
        agreement.is_rising,
        rank,
        expected_calibration_error(stated, is_right, BINS),
        reliability(stated, is_right),
        [i for i in right.argsort(stable=True).tolist() if right[i] < 1 - UNSURE],
    )


def reliability(stated: Tensor, is_right: Tensor) -> list[dict[str, float]]:
    """Return stated probability and share right, by bins of equally many."""
    bins = stated.argsort(stable=True).tensor_split(BINS)
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


def reason(ppl_diff: float, preference_right: float, labelled_otherwise: str) -> str:
    """Return in plain words why a label is believed as it is.

    Args:
        ppl_diff: nats per token.
        preference_right: how often a preference as strong as the model's is right.
        labelled_otherwise: where the same two responses are labelled the other way round, "" for
            nowhere.
    """
    strength = f"PPLDiff {ppl_diff:+.2f} nats per token"
    if abs(preference_right - 0.5) < 0.1:
        words = f"the model hardly prefers either response ({strength})"
    else:
        does = "contradicts" if ppl_diff > 0 else "agrees with"
        often = f"{preference_right:.0%}" if preference_right < 0.995 else "more than 99%"
        words = (
            f"the model {does} the label ({strength}), and such a preference of its is right in "
            f"{often} of cases"
        )
    if not labelled_otherwise:
        return words
    return f"{words}; the same two responses are labelled the other way round {labelled_otherwise}"


def longer_is_chosen(pairs: Dataset) -> float:
    """Return the share of pairs, (n,), whose longer response is the one labelled better.

    In tokens; pairs of equally long ones count half.
    """
    by = token_counts(pairs, "chosen_ids") - token_counts(pairs, "rejected_ids")
    return float(((by > 0).double() + (by == 0) / 2).mean())
