"""Ways to find wrong labels, each given the same noisy and trusted pairs (for evidence.py).

Shapes: n noisy pairs, m trusted ones; K columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import process_time
from zlib import crc32

import torch
from torch import Tensor

from softpref.statistics.calibration import expected_calibration_error
from softpref.statistics.evidence import fit_evidence
from softpref.statistics.noise_rate import NoiseRate
from softpref.statistics.pair_signals import PairSignals
from softpref.study.confident import self_confidence
from softpref.study.scorers import average_precision
from softpref.training.metrics import auroc

BUCKETS = 4096
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Of a ridge, as shares of the mean squared length of a trusted row."""


@dataclass(frozen=True)
class Split:
    """Pairs in the order in which they are labelled, and what is known of them.

    Attributes:
        noisy: signals of the pairs whose labels are in doubt.
        trusted: signals of the pairs whose labels are known.
        noisy_words: (n, BUCKETS) words of the response labelled better less those of the other.
        trusted_words: (m, BUCKETS) likewise.
        seed: of the deal into folds.
    """

    noisy: PairSignals
    trusted: PairSignals
    noisy_words: Tensor
    trusted_words: Tensor
    seed: int


@dataclass(frozen=True)
class Found:
    """What a way says of the noisy pairs.

    Attributes:
        belief: (n,) higher where the label looks more right.
        p_correct: (n,) the probability that it is right; None where the way knows none.
        noise: share of wrong labels; likewise.
        speaks: whether the way claims anything.
    """

    belief: Tensor
    p_correct: Tensor | None = None
    noise: NoiseRate | None = None
    speaks: bool = True


def by_evidence(split: Split) -> Found:
    """Fit the audit's evidence as it is by default."""
    evidence = fit_evidence(split.noisy, split.trusted, split.seed)
    p_correct = evidence.probability_correct(evidence.noisy, evidence.rates(split.noisy))
    return Found(evidence.noisy, p_correct, evidence.noise, evidence.speaks)


def by_ppl_diff(split: Split) -> Found:
    """Return minus PPLDiff, the paper's one signal."""
    return Found(split.noisy.fluency)


def by_length(split: Split) -> Found:
    """Prefer the longer response, or the shorter where more trusted pairs do."""
    longer = split.trusted.odd["length"].sign().sum() >= 0
    return Found(split.noisy.odd["length"] * (1 if longer else -1))


def by_words(split: Split) -> Found:
    """Return a ridge on words."""
    return Found(ridge(split.trusted_words, split.noisy_words))


def by_states(split: Split) -> Found:
    """Return a ridge on hidden states at half depth."""
    return Found(ridge(split.trusted.odd["content"], split.noisy.odd["content"]))


def by_confident_learning(split: Split) -> Found:
    """Ask cleanlab about the same hidden states; trusted pairs are more labels to it."""
    n = len(split.noisy)
    states = torch.cat([split.noisy.odd["content"], split.trusted.odd["content"]])
    quality, _ = self_confidence(states)
    return Found(quality[:n], quality[:n])


WAYS: dict[str, Callable[[Split], Found]] = {
    "evidence": by_evidence,
    "length rule": by_length,
    "ridge of states": by_states,
    "ridge of words": by_words,
    "confident learning": by_confident_learning,
    "PPLDiff": by_ppl_diff,
}


def word_differences(pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Return hashed counts of the first text's words less the second's, (N, BUCKETS)."""
    counts = torch.zeros(len(pairs), BUCKETS, dtype=torch.float64)
    for row, texts in zip(counts, pairs, strict=True):
        for text, sign in zip(texts, (1.0, -1.0), strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[crc32(word.encode()) % BUCKETS] += sign
    return counts


def ridge(trusted: Tensor, noisy: Tensor) -> Tensor:
    """Return x·w of the noisy pairs, (n,), λ by the error of left-out trusted pairs.

        w = argmin Σ_j (1 − x_j·w)² + λ |w|²

    Columns are odd, so a pair that is swapped has the target −1 and adds nothing new.

    Args:
        trusted: (m, K) columns x of pairs that are labelled right.
        noisy: (n, K) of the others.
    """
    trusted, noisy = trusted.double(), noisy.double()
    gram = trusted @ trusted.T
    size = gram.diagonal().mean()
    fits = []
    for penalty in PENALTIES:
        inverse = torch.linalg.inv(gram + penalty * size * torch.eye(len(gram)).double())
        dual = inverse.sum(1)
        left_out = dual / inverse.diagonal()  # 1 − x_j·w of the fit without pair j
        fits.append((float(left_out.square().sum()), trusted.T @ dual))
    _, weights = min(fits, key=lambda fit: fit[0])
    return noisy @ weights


def measure(way: str, split: Split, is_wrong: Tensor) -> dict[str, float | None]:
    """Return how well a way does on a split whose wrong labels (n,) are known.

    `auroc` and `average_precision`; of ways with probabilities `ece`, `suspects` (how many have
    p < 1/2) and `precision` of these (None without any); of ways that estimate the noise `rate`,
    its interval's `low` and `high`, `covered`, and `told` (1 where the audit gives a number, not
    only an interval). Shares are x 100.
    """
    start = process_time()
    found = WAYS[way](split)
    numbers: dict[str, float | None] = {
        "seconds": process_time() - start,
        "auroc": 100 * auroc(found.belief, ~is_wrong),
        "average_precision": 100 * average_precision(-found.belief, is_wrong),
        "speaks": float(found.speaks),
    }
    if found.p_correct is not None:
        suspect = found.p_correct < 0.5
        numbers |= {
            "ece": 100 * expected_calibration_error(found.p_correct, ~is_wrong),
            "suspects": float(suspect.sum()),
            "precision": 100 * float(is_wrong[suspect].double().mean()) if suspect.any() else None,
        }
    if found.noise:
        true = float(is_wrong.double().mean())
        numbers |= {
            "rate": 100 * found.noise.expected,
            "low": 100 * found.noise.low,
            "high": 100 * found.noise.high,
            "covered": float(found.noise.low <= true <= found.noise.high),
            "told": float(found.noise.told is not None),
        }
    return numbers
