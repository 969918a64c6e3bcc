"""The two recipes that fill open options, and what `recommended` makes of a run's length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SAME: Any = object()


@dataclass
class Recipe:
    """What fills an option that was left open, by recipe; `recommended` is both unless they differ.

    Recommended values were tuned in the synthetic world on seeds 1000 and up. Faithful ones are
    those of Table 5 and Appendix C.
    """

    recommended: Any
    faithful: Any = SAME

    def __post_init__(self) -> None:
        if self.faithful is SAME:
            self.faithful = self.recommended


ENOUGH_STEPS = 100
"""In far fewer steps a policy hardly moves (docs/methods.md)."""
MOST_MICRO_BATCHES, MOST_EPOCHS = 4, 3

# AdamW moves a weight by about its learning rate an update, so this is how far φ's weights may walk
# in one run: the paper's 1e-4 over its 80,000 / 64 updates. Never faster than the largest rate:
# in short runs a larger one tore warm-started labels down before clean pairs had said much.
META_WALK = 0.125
LARGEST_META_LR = 1e-3


def choose_steps(
    pairs: int, micro_batch: int, micro_batches: int | None, epochs: float | None
) -> tuple[int, float]:
    """Return micro-batches a step and passes that give about `ENOUGH_STEPS`.

    Few pairs take more passes, 1 to 3, and then smaller steps, 4 micro-batches to 1: small steps
    follow single wrong labels further.

    Args:
        pairs: training pairs.
        micro_batch: pairs in one micro-batch of all processes.
        micro_batches: of a step; None to choose them.
        epochs: passes over the pairs; None to choose them.
    """
    enough = ENOUGH_STEPS * micro_batch
    if epochs is None:
        needed = round(enough * (micro_batches or MOST_MICRO_BATCHES) / pairs)
        epochs = min(max(needed, 1), MOST_EPOCHS)
    if micro_batches is None:
        micro_batches = min(max(int(pairs * epochs / enough), 1), MOST_MICRO_BATCHES)
    return micro_batches, epochs


def teaching_share(clean_batch: int, pairs: int, every: int) -> float:
    """Return m: a run that teaches a meta-learner costs (1 + m) times its plain steps.

    It is the clean batch over the `pairs` of a step over the steps between its updates.
    """
    return clean_batch / pairs / every


def choose_meta_lr(meta_updates: int) -> float:
    """Return the meta-learner's learning rate for a run of `meta_updates` updates of φ."""
    return min(LARGEST_META_LR, META_WALK / max(1, meta_updates))
