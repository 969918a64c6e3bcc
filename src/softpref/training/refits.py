"""A supervised labeller in training: what it is fitted on, when, and what its pairs keep.

Shapes: n training pairs, m trusted pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from softpref.algorithm.evidence_labeller import EvidenceLabeller
from softpref.algorithm.labeller import Labeller
from softpref.algorithm.likelihood import Measured
from softpref.algorithm.posterior_labeller import PosteriorLabeller
from softpref.models.scoring import numbers
from softpref.training.labels import LabelHistory
from softpref.training.preparation import Prepared
from softpref.training.reliabilities import Reliabilities, numbers_or_nan

NOISY_A_TRUSTED = 4
"""Noisy pairs drawn between two fits, for each trusted pair that a fit scores: a twelfth of DPO's
price."""
LATEST = 2048
"""Noisy pairs of a fit, the last ones that were drawn."""


class Refits:
    """Fits the labeller as noisy pairs are drawn, and keeps each pair's first label.

    From a pair's second visit on its margin has seen its label, so that it tells nothing of it any
    more: the pair keeps the label of its first, and only first visits are fitted on.

    Args:
        labeller: what is fitted.
        pairs: the training pairs.
        trusted: the trusted pairs.
        score: measures pairs under the policy as it is.
    """

    def __init__(
        self,
        labeller: EvidenceLabeller,
        pairs: Dataset,
        trusted: Dataset,
        score: Callable[[Dataset, str], Measured],
    ) -> None:
        self._labeller, self._score, self._trusted = labeller, score, trusted
        self._evidence, self._of_trusted = (
            numbers(of, "evidence").double() for of in (pairs, trusted)
        )
        self._first = numbers_or_nan(pairs, "given_label").float()
        self._is_fitted = self._first.isnan()  # ties are not
        self._since = torch.zeros((), dtype=torch.int64)
        self._enough = NOISY_A_TRUSTED * len(trusted)

    def before_step(self, history: LabelHistory) -> None:
        """Fit if enough pairs were drawn since the last fit and some have no label yet."""
        if self._since < self._enough or not self._first.isnan().any():
            return
        self._since.zero_()
        drawn = history.first_visits(self._is_fitted, LATEST)
        trusted = self._score(self._trusted, "labelling, clean")
        self._labeller.refit(
            self._evidence[drawn["index"]], drawn["margin"], self._of_trusted, trusted.margin
        )

    def with_first_labels(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a step's pairs, those that were trained on before with their first label."""
        return [dict(row) | {"given_label": float(self._first[row["index"]])} for row in rows]

    def seen(self, scored: Measured) -> Measured:
        """Return measurements of all training pairs with the labels that they keep."""
        return dataclasses.replace(scored, given_label=self._first)

    def keep(self, index: Tensor, soft_label: Tensor) -> None:
        """Keep the labels of a step, (B,); a pair that had one comes with the same again."""
        self._first[index] = soft_label.to(self._first)
        self._since += len(index)

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs."""
        labeller = self._labeller
        return {
            "refits.coefficients": labeller.coefficients,
            "refits.size": labeller.size,
            "refits.first": self._first,
            "refits.since": self._since,
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        self._labeller.coefficients.copy_(tensors["refits.coefficients"])
        self._labeller.size.copy_(tensors["refits.size"])
        self._first.copy_(tensors["refits.first"])
        self._since.copy_(tensors["refits.since"])


def learning_of(
    labeller: Labeller, prepared: Prepared, score: Callable[[Dataset, str], Measured]
) -> Refits | Reliabilities | None:
    """Return what the labeller learns by in training; None where a teacher or nothing does."""
    if isinstance(labeller, PosteriorLabeller):
        return Reliabilities(labeller, prepared.train)
    if not isinstance(labeller, EvidenceLabeller) or prepared.clean is None:
        return None
    return Refits(labeller, prepared.train, prepared.clean, score)
