"""Who says how far to believe a pair.

Shapes: B pairs; F signals of each; PPLDiff (B,) in nats per token, raw; soft labels (B,) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softpref.algorithm.likelihood import Measured
from softpref.algorithm.signals import PPL_DIFF, Signal
from softpref.statistics.calibration import Calibration

FOLLOW_RATE = 0.1
WARM_START_STEPS = 200


class Labeller(Protocol):
    """Maps what was measured of B pairs to their soft labels p̂, (B,).

    A pair that comes with a label of its own keeps it, such as a tie its 1/2.
    """

    def label(self, measured: Measured) -> Tensor: ...


def unless_given(soft_label: Tensor, measured: Measured) -> Tensor:
    """Return the soft labels, (B,), of pairs that come without one, and the others' own."""
    if measured.given_label is None:
        return soft_label
    given = measured.given_label.to(soft_label)
    return torch.where(given.isnan(), soft_label, given)


@dataclass(frozen=True)
class Constant:
    """The same soft label for every pair, whatever it brings; 1 makes the geometric loss DPO."""

    soft_label: float

    def label(self, measured: Measured) -> Tensor:
        return torch.full_like(measured.margin, self.soft_label)


@dataclass(frozen=True)
class AsGiven:
    """The soft label that came with each pair, and `otherwise` where none did (NaN)."""

    otherwise: float

    def label(self, measured: Measured) -> Tensor:
        return unless_given(torch.full_like(measured.margin, self.otherwise), measured)


@dataclass(frozen=True)
class Threshold:
    """PerpCorrect's rule: 1 up to PPLDiff τ, and 0, the label reversed, beyond (Kong et al. 2024).

    PPLDiff is the starting policy's; `threshold` is τ, nats per token.
    """

    threshold: float

    def __call__(self, ppl_diff: Tensor) -> Tensor:
        return (ppl_diff <= self.threshold).to(ppl_diff)

    def label(self, measured: Measured) -> Tensor:
        return unless_given(self(measured.starting_ppl_diff), measured)

    @staticmethod
    def fit(clean_ppl_diff: Tensor, noise_rate: float) -> Threshold:
        """Return the rule with the τ that is right most often, by the clean pairs.

            τ = argmax (1 − ε) P(x ≤ τ) + ε P(−x > τ)

        over clean pairs' PPLDiff x as given, weight 1 − ε, and swapped, weight ε. Of several such τ
        the middle of the widest stretch is taken. (On right pairs alone τ = ∞ would be best; the
        paper's Appendix C does not say how it is found.)

        Args:
            clean_ppl_diff: (n,) PPLDiff of the clean pairs under the starting policy.
            noise_rate: ε, share of flipped labels.
        """
        x = clean_ppl_diff.double().sort().values
        cuts = torch.cat([x, -x]).unique()
        ends = torch.cat([cuts[:1] - 1, cuts, cuts[-1:] + 1])
        between = (ends[1:] + ends[:-1]) / 2
        kept = torch.searchsorted(x, between, right=True) / len(x)
        reversed_ = torch.searchsorted(x, -between) / len(x)
        right = (1 - noise_rate) * kept + noise_rate * reversed_
        best = right >= right.max() - 1e-12
        widest = torch.where(best, ends[1:] - ends[:-1], -1.0).argmax()
        return Threshold(float(between[widest]))


class MetaLearner(nn.Module):
    """V(·; φ): signals to soft label by an MLP F → 128 → 128 → 1 (Eq. 6, Appendix C).

        p̂ = σ(MLP((x − mean) / deviation))

    The paper's V has one signal, PPLDiff. Mean and deviation of the z-score, (F,), are buffers, 0
    and 1 until `standardise` sets them, so that the module is one thing to save, load and call on
    raw signals, (B, F), or (B,) where there is one. A fresh one says about 0.5.

    Args:
        hidden: width of the two hidden layers.
        signals: what it sees of a pair, in the order of its inputs.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, hidden: int = 128, signals: Sequence[Signal] = (PPL_DIFF,)) -> None:
        super().__init__()
        self.signals, self.hidden = tuple(signals), hidden
        self.register_buffer("mean", torch.zeros(len(signals)))
        self.register_buffer("deviation", torch.ones(len(signals)))
        self.layers = nn.Sequential(
            nn.Linear(len(signals), hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def __repr__(self) -> str:
        names, count = ", ".join(each.name for each in self.signals), self.hidden
        size = sum(weights.numel() for weights in self.parameters())
        return f"<MetaLearner of {names}: two hidden layers of {count}, {size:,} weights>"

    def standardise(self, signals: Tensor) -> None:
        """Take the z-score's mean and deviation from a sample of pairs, (n, F) or (n,), n ≥ 2.

        A signal without spread keeps deviation 1.
        """
        sample = self._columns(signals)
        deviation = sample.std(0)
        self.mean.copy_(sample.mean(0))
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def follow(self, signals: Tensor) -> None:
        """Let the z-score follow the batches, (B, F) or (B,), a tenth of the way at each.

        A batch of one pair has no deviation and is passed over.
        """
        if len(signals) < 2:
            return
        sample = self._columns(signals)
        self.mean.lerp_(sample.mean(0), FOLLOW_RATE)
        self.deviation.lerp_(sample.std(0), FOLLOW_RATE)

    def inputs(self, measured: Measured) -> Tensor:
        """Return the signals of measured pairs, raw, (B, F)."""
        return torch.stack([signal.of(measured).to(self.mean) for signal in self.signals], -1)

    def logit(self, signals: Tensor) -> Tensor:
        """Return the MLP's output before the sigmoid, shape (B,)."""
        standardised = (self._columns(signals) - self.mean) / self.deviation
        return self.layers(standardised).squeeze(-1)

    def forward(self, signals: Tensor) -> Tensor:
        """Return p̂, shape (B,), for raw signals, (B, F) or (B,)."""
        return self.logit(signals).sigmoid()

    def label(self, measured: Measured) -> Tensor:
        """Return p̂ of measured pairs, shape (B,)."""
        return unless_given(self(self.inputs(measured)), measured)

    def evidence(self, measured: Measured) -> Tensor:
        """Return logit(x) − logit(x · parity), (B,): how much more V believes a pair than swapped.

        It changes its sign where the responses change places, whatever V has learned.
        """
        signals = self.inputs(measured)
        return self.logit(signals) - self.logit(self.swapped(signals))

    def swapped(self, signals: Tensor) -> Tensor:
        """Return the signals, (B, F), of the same pairs with their responses swapped."""
        return signals * signals.new_tensor([signal.parity for signal in self.signals])

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name in ("mean", "deviation"):  # without dimensions while there was one signal only
            if f"{prefix}{name}" in state:
                state[f"{prefix}{name}"] = state[f"{prefix}{name}"].reshape(-1)
        super()._load_from_state_dict(state, prefix, *rest)

    def _columns(self, signals: Tensor) -> Tensor:
        columns = (signals if signals.dim() > 1 else signals[:, None]).to(self.mean)
        if columns.shape[-1] != len(self.signals):
            names = ", ".join(signal.name for signal in self.signals)
            raise ValueError(f"V sees {names}: give one column for each, not {columns.shape[-1]}")
        return columns


def warm_start(
    meta_learner: MetaLearner, clean: Tensor, clean_score: Tensor, noise_rate: float
) -> None:
    """Fit V to what the clean pairs say, as given (right) and swapped (wrong), before any training.

    V learns P(label right | score) under the noise rate as prior, by cross-entropy on the clean
    pairs' signals and those of the swapped pairs. The targets are the smooth curve of
    `Calibration`, not the labels 1 and 0 themselves: from some 150 pairs the MLP would learn their
    accidents. The curve is one score's whatever V sees: what others add is left to teaching.
    Departs from the paper, whose V starts at random (p̂ ≈ 0.5) and gives the policy no gradient at
    first.

    Args:
        meta_learner: changed in place; its z-score is already set.
        clean: (n, F), the clean pairs' signals under the starting policy.
        clean_score: (n,) odd, larger where a label looks right: minus PPLDiff, or evidence.
        noise_rate: the share of flipped labels, in [0, 0.5].
    """
    optimizer = torch.optim.AdamW(meta_learner.parameters(), lr=1e-2, weight_decay=0.0)
    both_ways = torch.cat([clean, meta_learner.swapped(clean)])
    scores = torch.cat([clean_score, -clean_score])
    target = Calibration.fit(clean_score).probability_correct(scores, noise_rate)
    for _ in range(WARM_START_STEPS):
        logit = meta_learner.logit(both_ways)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logit, target.to(logit)).backward()
        optimizer.step()
    optimizer.zero_grad()
