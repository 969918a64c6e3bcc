"""The methods as data: whose labels, from which PPLDiff, and which options they read."""

from __future__ import annotations

from dataclasses import dataclass

from softpref.algorithm.bilevel import CURRENT, STARTING, Signal
from softpref.algorithm.labeller import Constant, Labeller

META_OPTIONS = frozenset(
    {
        "clean_gradient",
        "engine",
        "keep_budget_gib",
        "lookahead",
        "lookahead_lr",
        "meta_batch_size",
        "meta_every",
        "meta_hidden",
        "meta_lr",
        "noise_rate",
        "warm_start",
        "zscore",
    }
)


@dataclass(frozen=True)
class Method:
    """One way to align: the step of bilevel.py with this labeller.

    Attributes:
        labeller: who says how far to believe a pair; None is a meta-learner, taught in training.
        signal: the PPLDiff the labeller sees.
        options: the options the method reads, of those that only some methods read; setting any
            other of these is an error.
        source: where the method comes from.
    """

    labeller: Labeller | None
    signal: Signal
    options: frozenset[str]
    source: str

    @property
    def teaches(self) -> bool:
        """Whether the labeller learns from the clean pairs while the policy trains."""
        return self.labeller is None


METHODS = {
    "mspo": Method(None, CURRENT, META_OPTIONS, "Eq. 5 to 12"),
    "mspo_static": Method(None, STARTING, META_OPTIONS, "section 4.3, Table 3"),
    "dpo": Method(Constant(1.0), CURRENT, frozenset(), "Rafailov et al. 2023, Eq. 2"),
}
