"""What is logged of a step or an evaluation, by TRL's names and our own.

Shapes: every tensor is (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from softpref.algorithm.likelihood import Measured
from softpref.algorithm.objective import geometric_loss


def auroc(scores: Tensor, is_positive: Tensor) -> float:
    """Return the probability that a positive outranks a negative, a tie counting half.

    Args:
        scores: (n,), higher for what should be positive.
        is_positive: (n,) bool.

    Returns:
        A share in [0, 1]; NaN where there is only one kind.
    """
    _, place, count = torch.unique(scores, return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2).double()[place]
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    wins = float(rank[is_positive].sum()) - positives * (positives + 1) / 2
    return wins / (positives * negatives) if positives and negatives else math.nan


def reward_columns(measured: Measured, beta: float) -> dict[str, Tensor]:
    """Return TRL's metrics by pair: a reward is β times a response's log-ratio; logps in nats."""
    return {
        "rewards/chosen": beta * measured.chosen_logratio,
        "rewards/rejected": beta * measured.rejected_logratio,
        "rewards/margins": beta * measured.margin,
        "rewards/accuracies": measured.margin > 0,
        "logps/chosen": measured.chosen_logp,
        "logps/rejected": measured.rejected_logp,
    }


def label_columns(soft_label: Tensor, ppl_diff: Tensor) -> dict[str, Tensor]:
    """Return the labels, which are below one half, and PPLDiff, nats per token."""
    return {
        "labels/mean": soft_label,
        "labels/below_half": soft_label < 0.5,
        "ppl_diff/mean": ppl_diff,
    }


def means(columns: Mapping[str, Tensor], **numbers: Tensor) -> dict[str, float]:
    """Return columns' means, and numbers, shape (), as they are; waits for the device once."""
    found = torch.stack(list(columns.values())).mean(1)
    if numbers:
        found = torch.cat([found, torch.stack(list(numbers.values()))])
    return dict(zip((*columns, *numbers), found.tolist(), strict=True))


def evaluation_metrics(
    measured: Measured,
    beta: float,
    prefix: str,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
) -> dict[str, float]:
    """Return the DPO loss (Eq. 2), TRL's metrics and the caller's own, each named with a prefix."""
    metrics = {"loss": float(geometric_loss(measured.margin, 1.0, beta).mean())}
    metrics |= means(reward_columns(measured, beta))
    if compute_metrics is not None:
        metrics |= compute_metrics(_rewards(measured, beta))
    return {f"{prefix}_{name.removeprefix(f'{prefix}_')}": of for name, of in metrics.items()}


def _rewards(measured: Measured, beta: float) -> EvalPrediction:
    """Return implicit rewards, (B, 2), chosen first, as transformers' `compute_metrics` takes them.

    The labels, (B,), are the place of the response labelled better: 0.
    """
    ratios = torch.stack([measured.chosen_logratio, measured.rejected_logratio], -1)
    rewards = (beta * ratios).float().numpy()
    return EvalPrediction(predictions=rewards, label_ids=np.zeros(len(rewards), dtype=np.int64))


def truth_metrics(soft_label: Tensor, is_flipped: Tensor) -> dict[str, float]:
    """Return the mean labels of flipped and of right pairs; of none of a kind, no mean.

    `soft_label` is (B,); `is_flipped` is (B,) as of `known_flips`.
    """
    kinds = {"labels/flipped": 1, "labels/clean": 0}
    parts = {name: soft_label[is_flipped == kind] for name, kind in kinds.items()}
    return {name: float(part.mean()) for name, part in parts.items() if len(part)}
