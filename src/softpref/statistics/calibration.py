"""From an odd score to the probability that a pair's label is right.

A score t is odd: swapping the two responses of a pair turns it into -t (minus PPLDiff, or a
meta-learner's logit difference). If t has density f under a right label it has f(-t) under a
flipped one, so the log-odds g(t) = log f(t) / f(-t) is odd too, and no density has to be estimated:
g is the odd logistic regression of "as given" against "swapped" on pairs known to be right.

Shapes: N pairs, R assumed noise rates, K = 2 coefficients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_SHARPNESS = 2.0  # of the saturating term: it bends at half the median |score|
SWAPPED_WEIGHT = 0.5  # pairs; what is added on the wrong side, so that separable sets stay finite
_MIN_COEFFICIENT = 1e-3  # keeps g strictly increasing even where the score carries nothing
_MAX_ITERATIONS = 60
_TOLERANCE = 1e-5  # nats of log-likelihood


def check_scores(name: str, scores: Tensor, at_least: int = 1) -> None:
    """Raise ValueError, naming the tensor, unless it is 1-D, floating, finite and long enough."""
    if scores.ndim != 1 or not scores.is_floating_point():
        raise ValueError(f"{name} must be a 1-D float tensor, not {scores.dtype} of {scores.shape}")
    if len(scores) < at_least:
        raise ValueError(f"{name} holds {len(scores)} pairs; at least {at_least} are needed")
    if not scores.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite")


def robust_scale(scores: Tensor) -> float:
    """Median |score|, or the mean where the median is 0, or 1 where all scores are 0."""
    size = scores.abs().double()
    return size.median().item() or size.mean().item() or 1.0


def odd_basis(scores: Tensor, scale: float) -> Tensor:
    """Return t / s (exact for Gaussian scores) and tanh(2 t / s) (a ceiling), (..., N, K)."""
    unit = scores.double() / scale
    return torch.stack([unit, torch.tanh(_SHARPNESS * unit)], dim=-1)


def clean_rows(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores and weights, (2N,) each: clean pairs as given and, 1/2 in all, swapped."""
    swapped = SWAPPED_WEIGHT * counts / counts.sum()
    return torch.cat([scores, -scores]), torch.cat([counts, swapped])


def _likelihood(
    basis: Tensor, weights: Tensor, flip_rate: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihood (R,), its gradient (R, K) and Fisher information (R, K, K).

    With q = sigma(g) and l = log((1 - e) / e): log P(as given | size) = log[(1 - e) q + e (1 - q)],
    its derivative in g is r - q and the information (r - q)(q - r'), where r = sigma(g + l) and
    r' = sigma(g - l) are the posteriors that the order given, or the other one, is right.
    """
    log_odds = coefficients @ basis.T
    prior = torch.log1p(-flip_rate) - flip_rate.log()
    q, posterior, other = (torch.sigmoid(log_odds + shift) for shift in (0.0, prior, -prior))
    value = logsigmoid(log_odds) + torch.log1p(-flip_rate) - logsigmoid(log_odds + prior)
    slope = weights * (posterior - q)
    curvature = slope * (q - other)
    information = torch.einsum("rn,nk,nl->rkl", curvature, basis, basis)
    return value @ weights, slope @ basis, information


def fit_coefficients(basis: Tensor, weights: Tensor, flip_rate: Tensor) -> Tensor:
    """Maximise the likelihood of g = basis @ coefficients, coefficients > 0, for R rates at once.

    Damped Fisher scoring, projected on the bounds; a step that does not gain is retried shorter.

    Args:
        basis: (N, K), odd functions of the pairs' scores.
        weights: (N,), how many pairs each row stands for.
        flip_rate: (R, N), the rate e at which each row's label is assumed to be flipped.

    Returns:
        Coefficients, shape (R, K).
    """
    current = basis.new_full((len(flip_rate), basis.shape[-1]), 0.3)
    value, gradient, information = _likelihood(basis, weights, flip_rate, current)
    damping = torch.full_like(value, 1e-3)
    identity = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    for _ in range(_MAX_ITERATIONS):
        free = ((current > _MIN_COEFFICIENT) | (gradient > 0)).to(basis.dtype)
        system = information * free[:, :, None] * free[:, None, :]
        system = system + (damping[:, None] * system.diagonal(dim1=1, dim2=2)).diag_embed()
        system = system + 1e-6 * identity + (1 - free).diag_embed()
        step = torch.linalg.solve(system, gradient * free)
        proposed = (current + step).clamp(min=_MIN_COEFFICIENT)
        new = _likelihood(basis, weights, flip_rate, proposed)
        gains = new[0] >= value
        converged = (new[0] - value).abs().max() < _TOLERANCE
        current = torch.where(gains[:, None], proposed, current)
        gradient = torch.where(gains[:, None], new[1], gradient)
        information = torch.where(gains[:, None, None], new[2], information)
        value = torch.where(gains, new[0], value)
        damping = torch.where(gains, damping / 5, damping * 10)
        if converged:
            break
    return current


@dataclass(frozen=True)
class Calibration:
    """g(t) = a t/s + b tanh(2 t/s), a, b > 0: odd and strictly increasing.

    It follows a Gaussian f exactly (b = 0) and a score that is right for a fixed share of the pairs
    however large it is (a = 0). The paper has no such map; its soft labels are no probabilities.

    Attributes:
        linear: a, in nats per scale.
        saturating: b, in nats.
        scale: s, the median |score| of the clean pairs, in the score's unit.
    """

    linear: float
    saturating: float
    scale: float

    @classmethod
    def fit(cls, scores_clean: Tensor) -> "Calibration":
        """Fit by maximum likelihood on pairs known to be labelled right.

        Maximises sum_i log sigma(g(t_i)) + mean_i log sigma(-g(t_i)) / 2; the second term is half
        a pair labelled wrong, spread over all, and keeps separable sets finite.

        Args:
            scores_clean: (N,), odd scores, larger where the label looks more right.

        Raises:
            ValueError: Not a 1-D float tensor, empty, or not finite.
        """
        check_scores("scores_clean", scores_clean)
        scale = robust_scale(scores_clean)
        scores = scores_clean.double()
        rows, weights = clean_rows(scores, torch.ones_like(scores))
        rate = torch.zeros_like(weights)[None]
        linear, saturating = fit_coefficients(odd_basis(rows, scale), weights, rate)[0].tolist()
        return cls(linear, saturating, scale)

    def log_odds(self, scores: Tensor) -> Tensor:
        """g(t) in nats, float64, same shape as scores: the log-odds before any noise."""
        basis = odd_basis(scores, self.scale)
        return self.linear * basis[..., 0] + self.saturating * basis[..., 1]

    def probability_correct(self, scores: Tensor, noise_rate: float) -> Tensor:
        """Probability that each label is right, the posterior under the prior noise_rate.

        p = (1 - e) q / ((1 - e) q + e (1 - q)) with q = sigma(g(t)) and e = noise_rate, which is
        sigma(g(t) + log((1 - e) / e)): 1 everywhere at e = 0, q itself at e = 1/2. For e > 0 it
        ranks pairs as the raw score does (up to rounding near 0 and 1; `log_odds` never ties).

        Raises:
            ValueError: noise_rate outside [0, 0.5].
        """
        if not 0.0 <= noise_rate <= 0.5:
            raise ValueError(f"noise_rate must lie in [0, 0.5], not {noise_rate}")
        rate = torch.tensor(noise_rate, dtype=torch.float64, device=scores.device)
        return torch.sigmoid(self.log_odds(scores) + torch.log1p(-rate) - rate.log())


def cross_fit(scores_clean: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """Out-of-fold q = sigma(g(t)) of each clean pair as given, by a fit that never saw it.

    Args:
        scores_clean: (N,), odd scores of pairs known to be labelled right.
        folds: how many parts the pairs are dealt into, 2 to N.
        generator: deals the pairs (on the CPU).

    Returns:
        q, shape (N,), float64. The same pair swapped has 1 - q.

    Raises:
        ValueError: folds out of range, or scores as in `Calibration.fit`.
    """
    check_scores("scores_clean", scores_clean)
    if not 2 <= folds <= len(scores_clean):
        raise ValueError(f"folds must lie in 2 to {len(scores_clean)}, not {folds}")
    order = torch.randperm(len(scores_clean), generator=generator).to(scores_clean.device)
    probability = torch.empty_like(scores_clean, dtype=torch.float64)
    for held_out in order.tensor_split(folds):
        seen = torch.ones_like(scores_clean, dtype=torch.bool)
        seen[held_out] = False
        fitted = Calibration.fit(scores_clean[seen])
        probability[held_out] = torch.sigmoid(fitted.log_odds(scores_clean[held_out]))
    return probability


def expected_calibration_error(probability: Tensor, is_correct: Tensor, bins: int = 10) -> float:
    """Mean gap between stated and observed share, over bins of equal count.

    sum_b (n_b / N) |mean probability in b - share correct in b|, bins cut by rank of probability.
    Equal probabilities count with their common share: which of them a cut parts must not matter.

    Args:
        probability: (N,), in [0, 1].
        is_correct: (N,), bool.
        bins: number of bins; with fewer pairs than bins every pair is its own.
    """
    order = probability.argsort(stable=True)
    gap = (probability.double() - share_of_equals(probability, is_correct))[order]
    return sum(part.sum().abs().item() for part in gap.tensor_split(bins)) / len(gap)


def share_of_equals(probability: Tensor, is_correct: Tensor) -> Tensor:
    """For each pair, the share correct among pairs of the same probability, (N,) float64."""
    _, place = probability.unique(return_inverse=True)
    count = torch.bincount(place)
    return (torch.bincount(place, weights=is_correct.double()) / count)[place]
