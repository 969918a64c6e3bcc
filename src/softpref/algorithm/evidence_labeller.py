"""Soft labels from what is known of a pair before training and from its margin in training.

Shapes: B pairs; n noisy and m trusted pairs of one refit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softpref.algorithm.labeller import unless_given
from softpref.algorithm.likelihood import Measured
from softpref.statistics.calibration import odd_basis, robust_scale
from softpref.statistics.noisy_logistic import LEAST_RATE, fit

SUREST = 2.0
"""Nats beyond which evidence from before training is not taken at its word."""
_PENALTY = 1.0


class EvidenceLabeller:
    """Labels by supervised evidence: no look-ahead, no Jacobian.

        g = (1 + a) G + b h/s + c tanh(2 h/s),    G = 2 tanh(g_0 / 2)
        p̂ = σ(g + log((1 − ε) / ε))

    g_0 is the evidence from before training, h the margin just before the pair's own update, when
    it has not seen the label yet. (a, b, c) start at 0 and are fitted again and again on trusted
    pairs, which the policy never trains on, and on noisy pairs of the last steps. A pair that
    comes with a label of its own keeps it. Not in the paper.

    Args:
        noise_rate: ε, the share of flipped labels.
    """

    def __init__(self, noise_rate: float) -> None:
        self._rate = max(noise_rate, LEAST_RATE)
        self.coefficients = torch.zeros(3, dtype=torch.float64)
        self.size = torch.ones((), dtype=torch.float64)

    def label(self, measured: Measured) -> Tensor:
        """Return p̂, (B,)."""
        known = _bounded(measured.evidence.double())
        columns = self._columns(known, measured.margin.detach())
        g = known + columns @ self.coefficients.to(known.device)
        prior = torch.log1p(-torch.tensor(self._rate)) - torch.tensor(self._rate).log()
        return unless_given((g + prior).sigmoid(), measured)

    def refit(
        self,
        noisy_evidence: Tensor,
        noisy_margin: Tensor,
        trusted_evidence: Tensor,
        trusted_margin: Tensor,
    ) -> None:
        """Fit (a, b, c) by the likelihood of noisy_logistic.py; evidence and margins (n,), (m,).

        The noisy pairs' margins are those they had when they were drawn, the trusted pairs' are the
        policy's as it is.
        """
        known = _bounded(torch.cat([noisy_evidence, trusted_evidence]).double())
        margin = torch.cat([noisy_margin, trusted_margin]).double()
        rate = torch.full_like(known, self._rate)
        rate[len(noisy_evidence) :] = 0.0
        self.size.fill_(robust_scale(margin))
        penalty = torch.full((3,), _PENALTY, dtype=torch.float64)
        self.coefficients.copy_(fit(self._columns(known, margin), rate, penalty, known))

    def _columns(self, known: Tensor, margin: Tensor) -> Tensor:
        basis = odd_basis(margin, float(self.size))
        return torch.cat([known[:, None], basis], dim=1)


def _bounded(evidence: Tensor) -> Tensor:
    return SUREST * torch.tanh(evidence / SUREST)
