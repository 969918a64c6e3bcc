"""Soft labels by the posterior that a label is right, given who made it and the policy's margin.

Shapes: B pairs; K annotators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softpref.algorithm.labeller import unless_given
from softpref.algorithm.likelihood import Measured

FIRST_RELIABILITY = 0.9
_AVERAGING_RATE = 0.1
_SUREST = 1e-4


class PosteriorLabeller:
    """RE-PO's labels (Cao et al. 2026): the E-step of an EM over labels that may be wrong.

        p̂ = η_k σ(βh) / (η_k σ(βh) + (1 − η_k) σ(−βh)) = σ(βh + log(η_k / (1 − η_k)))

    η_k is annotator k's share of right labels, 0.9 at first; it follows the mean p̂ of k's pairs in
    each step, a tenth of the way. With the cross-entropy loss a step is the generalized M-step.
    η_k is kept 1e-4 away from 0 and 1, from which it could not return.

    Args:
        beta: β, 1/nats.
        annotators: K, the number of annotators; pairs without one share a reliability of their own.
    """

    def __init__(self, beta: float, annotators: int = 0) -> None:
        self._beta = beta
        self.reliability = torch.full((annotators + 1,), FIRST_RELIABILITY, dtype=torch.float64)

    def label(self, measured: Measured) -> Tensor:
        """Return p̂, (B,)."""
        margin = measured.margin.detach().double()
        who = self._places(measured.filled("annotator_index"))
        reliability = self.reliability.to(margin.device)[who]
        return unless_given((self._beta * margin + reliability.logit()).sigmoid(), measured)

    def follow(self, annotator_index: Tensor, soft_label: Tensor, weight: Tensor) -> None:
        """Let each reliability follow the mean label of its pairs in a step, by their weights.

        All are (B,), on the host.
        """
        who, weight = self._places(annotator_index), weight.double()
        count = torch.zeros_like(self.reliability).index_add(0, who, weight)
        total = torch.zeros_like(self.reliability).index_add(0, who, weight * soft_label.double())
        followed = self.reliability.lerp(total / count, _AVERAGING_RATE)
        followed = followed.clamp(_SUREST, 1 - _SUREST)
        self.reliability.copy_(torch.where(count > 0, followed, self.reliability))

    def _places(self, annotator_index: Tensor) -> Tensor:
        """Return each pair's place in `reliability`, (B,); the last is of unknown annotators."""
        return annotator_index.nan_to_num(len(self.reliability) - 1).long()
