"""What is measured of a pair apart from its label, as columns of a linear model.

A signal is odd if swapping a pair's responses changes its sign (the difference of their lengths),
and even if the swap changes nothing (their overlap). The log-odds that a label is right are odd, so
an even signal can only say how far to follow an odd one.

Shapes: N pairs; D numbers of a vector; K columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from softpref.statistics.calibration import robust_scale

MOST_COMPONENTS = 64
VECTOR_WEIGHT = 2.0
"""Root mean square norm of a vector's row; a single number has 1: how much each may say."""
CUT, EVEN_CUT = 4.0, 3.0
"""Where single numbers end, in root mean squares and in standard deviations."""
ROUNDING = 1e-4
"""Share of its root mean square below which an even signal's deviation is none: it is rounding, and
rounding depends on which response comes first, that is on the label."""


@dataclass(frozen=True)
class PairSignals:
    """Signals of N pairs, in the order in which their responses are labelled.

    Attributes:
        fluency: (N,) minus PPLDiff, nats per token; odd.
        odd: further odd signals by name: numbers (N,) or vectors (N, D).
        even: even signals by name, (N,).
    """

    fluency: Tensor
    odd: Mapping[str, Tensor]
    even: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.fluency)

    def __add__(self, other: PairSignals) -> PairSignals:
        """Return these pairs and the other ones after them."""
        return PairSignals(
            torch.cat([self.fluency, other.fluency]),
            {name: torch.cat([mine, other.odd[name]]) for name, mine in self.odd.items()},
            {name: torch.cat([mine, other.even[name]]) for name, mine in self.even.items()},
        )


@dataclass(frozen=True)
class SignalColumns:
    """Signals as columns of a like scale; the scales come from all pairs, no label is read.

    Attributes:
        scale: s, the median |t|.
        even: mean and standard deviation of each even signal; infinite where it is constant.
        odd: for each odd signal what turns its values to columns: (D, K) directions, or () a
            factor.
    """

    scale: float
    even: Mapping[str, tuple[float, float]]
    odd: Mapping[str, Tensor]

    @staticmethod
    def of(pairs: PairSignals) -> SignalColumns:
        """Return the columns for pairs like these."""
        even = {name: _spread(values.double()) for name, values in pairs.even.items()}
        odd = {name: _directions(values.double()) for name, values in pairs.odd.items()}
        return SignalColumns(robust_scale(pairs.fluency), even, odd)

    def __call__(self, pairs: PairSignals, curve: Tensor) -> dict[str, Tensor]:
        """Return the columns by what they are made of, (N, K) each; `curve` is g_A, (N,)."""
        saturated = torch.tanh(2 * pairs.fluency.double() / self.scale)[:, None]
        columns = {"curve": curve[:, None]}
        if self.even:
            scores = [
                ((pairs.even[name].double() - mean) / deviation).clamp(-EVEN_CUT, EVEN_CUT)
                for name, (mean, deviation) in self.even.items()
            ]
            even = torch.stack(scores, dim=1)
            j, k = torch.triu_indices(len(scores), len(scores))
            columns["even"] = saturated * torch.cat([even, even[:, j] * even[:, k] / 3], dim=1)
        for name, directions in self.odd.items():
            values = pairs.odd[name].double()
            if directions.ndim:
                columns[name] = values @ directions
            else:
                columns[name] = (values * directions).clamp(-CUT, CUT)[:, None]
        return columns


def _spread(values: Tensor) -> tuple[float, float]:
    deviation, size = float(values.std()), float(values.square().mean().sqrt())
    return float(values.mean()), deviation if deviation > ROUNDING * size else math.inf


def _directions(values: Tensor) -> Tensor:
    if values.ndim == 1:
        return 1 / (values.square().mean().sqrt() + 1e-12)
    if values.shape[1] > MOST_COMPONENTS:
        _, _, directions = torch.linalg.svd(values, full_matrices=False)
        directions = directions[:MOST_COMPONENTS].T
    else:
        directions = torch.eye(values.shape[1], dtype=values.dtype)
    size = (values @ directions).square().sum(1).mean().sqrt()
    return directions * VECTOR_WEIGHT / (size + 1e-12)
