"""PerpCorrect as its authors' repository has it: rounds of surrogates say which labels are wrong.

Kong et al. 2024, "Perplexity-aware Correction for Robust Alignment with Noisy Preferences".

As in the repository: PPL is the mean over prompt and response, whatever `ppl_scope` says of other
numbers; three epochs a surrogate, AdamW without decay, a linear schedule without warm-up. Departs
from it: a surrogate starts from the policy that is to be aligned, not from the model before SFT;
its learning rate, batch size, β and adapter are the run's (theirs: 1e-3, 4, 0.1, rank 32); the
clean pairs are not among the noisy ones; exactly as many pairs are taken as should be (theirs: one
more at the low end). For the fit see `TwoGaussians`.

Shapes: n noisy pairs, in the order of their data set.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softpref.algorithm.bilevel import NonFiniteError
from softpref.algorithm.labeller import Threshold
from softpref.errors import UsageError
from softpref.training.perpcorrect.surrogates import MORE_EACH_ROUND, ROUNDS, Surrogates
from softpref.training.perpcorrect.two_gaussians import TwoGaussians

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """What one surrogate was trained on and what it says.

    Attributes:
        believed: how many noisy pairs it was trained on as given.
        reversed: how many it was trained on the other way round.
        fit: what the noisy pairs' PPLDiff under it looks like.
    """

    believed: int
    reversed: int
    fit: TwoGaussians


@dataclass(frozen=True)
class Correction:
    """The labels that came of all rounds.

    Attributes:
        rounds: every round, in order.
        kept: the position of the best separated one, whose labels these are.
        labels: (n,) 1 where PPLDiff is at most that round's τ, else 0, the label reversed.
    """

    rounds: tuple[Round, ...]
    kept: int
    labels: Tensor

    @property
    def noise_rate(self) -> float:
        """1 − α of the kept round, the share of flipped labels."""
        return self.rounds[self.kept].fit.noise_rate

    def record(self) -> dict[str, Any]:
        """Return all numbers for the run's record; a τ of None reverses no label."""
        fit = self.rounds[self.kept].fit
        return {
            "alpha": fit.share_right,
            "noise_rate": fit.noise_rate,
            "threshold": fit.threshold if math.isfinite(fit.threshold) else None,
            "labels_reversed": int((self.labels == 0).sum()),
            "kept_round": self.kept,
            "rounds": [
                {
                    "pairs_as_given": each.believed,
                    "pairs_reversed": each.reversed,
                    "mu": each.fit.mean,
                    "sigma": each.fit.deviation,
                    "alpha": each.fit.share_right,
                    "separation": each.fit.separation,
                }
                for each in self.rounds
            ],
        }


def correct(surrogates: Surrogates) -> Correction:
    """Return labels for the noisy pairs, made in six rounds.

    Round r trains a fresh surrogate by DPO on the clean pairs and on 2r% of the noisy ones, of
    which the share α that the last round found is taken from the low end of PPLDiff, as given, and
    the rest from the high end, reversed. Round 0 has the clean pairs alone. The noisy pairs'
    PPLDiff under the surrogate is fitted by `TwoGaussians`; of all rounds the best separated one,
    the earliest of equals, says which labels are reversed.

    Raises:
        UsageError: a surrogate's loss or PPLDiff is not finite, or its PPLDiff is the same for all.
    """
    count = round(MORE_EACH_ROUND * surrogates.pairs)
    rounds: list[Round] = []
    scores: list[Tensor] = []
    believed: list[int] = []
    doubted: list[int] = []
    for number in range(ROUNDS):
        try:
            ppl_diff = surrogates.ppl_diff(number, believed, doubted)
        except NonFiniteError as error:
            raise _of_no_use(number, error) from error
        try:
            fit = TwoGaussians.fit(ppl_diff)
        except ValueError as error:
            raise _of_no_use(number, error) from error
        rounds.append(Round(len(believed), len(doubted), fit))
        scores.append(ppl_diff)
        _say(number, rounds[-1])
        believed, doubted = extremes(ppl_diff, (number + 1) * count, fit.share_right)
    kept = max(range(ROUNDS), key=lambda number: rounds[number].fit.separation)
    threshold = rounds[kept].fit.threshold
    labels = Threshold(threshold)(scores[kept])
    reversed_ = 100 * float((labels == 0).float().mean())
    logger.info(
        f"perpcorrect: round {kept} is kept; τ {threshold:.4f} nats per token, {reversed_:.1f}% of "
        "the labels reversed"
    )
    return Correction(tuple(rounds), kept, labels)


def extremes(ppl_diff: Tensor, count: int, share_right: float) -> tuple[list[int], list[int]]:
    """Return which pairs to believe, lowest PPLDiff first, and which to reverse, highest last.

    Args:
        ppl_diff: (n,), nats per token.
        count: how many in all.
        share_right: α, the share of them that is believed.
    """
    order = ppl_diff.argsort(stable=True)
    low = round(count * share_right)
    return order[:low].tolist(), order[len(order) - (count - low) :].tolist()


def _of_no_use(number: int, error: Exception) -> UsageError:
    return UsageError(
        f"--perpcorrect_mode official: the surrogate of round {number}: {error}. Lower "
        "--learning_rate, or choose --perpcorrect_mode threshold."
    )


def _say(number: int, done: Round) -> None:
    fit = done.fit
    logger.info(
        f"perpcorrect, round {number} of 0 to {ROUNDS - 1}: {done.believed} noisy pairs taken as "
        f"given and {done.reversed} reversed; PPLDiff μ {fit.mean:.4f}, σ {fit.deviation:.4f} nats "
        f"per token; α {100 * fit.share_right:.1f}% of the labels right; separation "
        f"{100 * fit.separation:.1f}%"
    )
