"""Who says how far to believe a pair.

Shapes: B pairs; PPLDiff (B,) in nats per token, raw; soft labels (B,) in [0, 1].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softpref.algorithm.calibration import Calibration

FOLLOW_RATE = 0.1
WARM_START_STEPS = 200


class Labeller(Protocol):
    """Maps what it sees of a pair (B,), mostly PPLDiff, to the soft label p̂ (B,)."""

    def __call__(self, signal: Tensor, /) -> Tensor: ...


class Constant:
    """The same soft label for every pair; 1 makes the geometric loss DPO."""

    def __init__(self, soft_label: float) -> None:
        self.soft_label = soft_label

    def __call__(self, ppl_diff: Tensor) -> Tensor:
        return torch.full_like(ppl_diff, self.soft_label)


class AsGiven:
    """The soft label that came with each pair, and `otherwise` where none did (NaN)."""

    def __init__(self, otherwise: float) -> None:
        self.otherwise = otherwise

    def __call__(self, given_label: Tensor) -> Tensor:
        return given_label.nan_to_num(self.otherwise)


class Threshold:
    """PerpCorrect's rule: 1 up to PPLDiff τ, and 0, the label reversed, beyond (Kong et al. 2024).

    Args:
        threshold: τ, nats per token.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, ppl_diff: Tensor) -> Tensor:
        return (ppl_diff <= self.threshold).to(ppl_diff)

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
    """V(·; φ): PPLDiff to soft label by an MLP 1 → 128 → 128 → 1 (Eq. 6, Appendix C).

        p̂ = σ(MLP((PPLDiff − mean) / deviation))

    Mean and deviation of the z-score are buffers, 0 and 1 until `standardise` sets them, so that
    the module is one thing to save, load and call on raw PPLDiff. A fresh one says about 0.5.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))
        self.layers = nn.Sequential(
            nn.Linear(1, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def standardise(self, ppl_diff: Tensor) -> None:
        """Take the z-score's mean and deviation from a sample of PPLDiff, shape (n,), n ≥ 2.

        A sample without spread keeps deviation 1.
        """
        sample = ppl_diff.to(self.mean)
        deviation = sample.std()
        self.mean.copy_(sample.mean())
        self.deviation.copy_(deviation if deviation > 0 else torch.ones(()))

    def follow(self, ppl_diff: Tensor) -> None:
        """Let the z-score follow the batches, shape (B,), a tenth of the way at each.

        A batch of one pair has no deviation and is passed over.
        """
        if len(ppl_diff) < 2:
            return
        sample = ppl_diff.to(self.mean)
        self.mean.lerp_(sample.mean(), FOLLOW_RATE)
        self.deviation.lerp_(sample.std(), FOLLOW_RATE)

    def logit(self, ppl_diff: Tensor) -> Tensor:
        """Return the MLP's output before the sigmoid, shape (B,)."""
        standardised = (ppl_diff.to(self.mean) - self.mean) / self.deviation
        return self.layers(standardised[:, None]).squeeze(-1)

    def forward(self, ppl_diff: Tensor) -> Tensor:
        """Return p̂, shape (B,), for raw PPLDiff, shape (B,)."""
        return self.logit(ppl_diff).sigmoid()


def warm_start(meta_learner: MetaLearner, ppl_diff_clean: Tensor, noise_rate: float) -> None:
    """Fit V to what the clean pairs say, as given (right) and swapped (wrong), before any training.

    V learns P(label right | x) under the noise rate as prior, by cross-entropy on the clean pairs'
    PPLDiff and its mirror images. The targets are the smooth curve of `Calibration`, not the labels
    1 and 0 themselves: from some 150 pairs the MLP would learn their accidents. Departs from the
    paper, whose V starts at random (p̂ ≈ 0.5) and gives the policy no gradient at first.

    Args:
        meta_learner: changed in place; its z-score is already set.
        ppl_diff_clean: (n,) PPLDiff of the clean pairs under the starting policy.
        noise_rate: the share of flipped labels, in [0, 0.5].
    """
    optimizer = torch.optim.AdamW(meta_learner.parameters(), lr=1e-2, weight_decay=0.0)
    x = torch.cat([ppl_diff_clean, -ppl_diff_clean])
    target = Calibration.fit(-ppl_diff_clean).probability_correct(-x, noise_rate)
    for _ in range(WARM_START_STEPS):
        logit = meta_learner.logit(x)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logit, target.to(logit)).backward()
        optimizer.step()
    optimizer.zero_grad()
