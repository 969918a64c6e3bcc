"""The methods as data: whose labels, from what, in which loss, and which options they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from softpref.algorithm.evidence_labeller import EvidenceLabeller
from softpref.algorithm.labeller import AsGiven, Constant, Labeller, Threshold
from softpref.algorithm.objective import CROSS_ENTROPY, GEOMETRIC, PairLoss
from softpref.algorithm.signals import PPL_DIFF, STARTING_PPL_DIFF, Signal

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
# Options that only some methods read.
METHOD_OPTIONS = META_OPTIONS | {"perpcorrect_mode", "signals"}
GDPO_LABEL = 0.9


@dataclass(frozen=True)
class Beginning:
    """What is known before the first step.

    Attributes:
        noise_rate: the share of flipped labels, given or estimated; NaN where it is neither.
        clean_ppl_diff: (n,) PPLDiff of the clean pairs under the starting policy; empty without.
        evidence_speaks: whether the signals tell right labels from wrong; False if not asked.
    """

    noise_rate: float
    clean_ppl_diff: Tensor
    evidence_speaks: bool = False


@dataclass(frozen=True)
class Method:
    """One way to align: the step of bilevel.py with this loss and these labels.

    Attributes:
        make_labeller: makes who says how far to believe a pair; None is a meta-learner, taught in
            training.
        source: where the method comes from.
        ppl_diff: the PPLDiff that is recorded beside the labels, and that a meta-learner sees
            unless `--signals` says otherwise.
        loss: what is made of margin and label.
        options: the options the method reads, of those that only some methods read; setting any
            other of these is an error.
        needs: what must be known of the training set: its `noise_rate`, a `clean` set beside it,
            `corrected_labels` that rounds of surrogates made, `evidence` from signals.
        given_by: the column that holds the labels where pairs bring their own; required of
            `is_flipped`, optional of `soft_label`.
    """

    make_labeller: Callable[[Beginning], Labeller] | None
    source: str
    ppl_diff: Signal = PPL_DIFF
    loss: PairLoss = GEOMETRIC
    options: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    given_by: str | None = None

    @property
    def teaches(self) -> bool:
        """Whether the labeller learns from the clean pairs while the policy trains."""
        return self.make_labeller is None

    @property
    def doubts(self) -> bool:
        """Whether single labels are doubted in training, so that the policy may judge them."""
        return self.teaches or "evidence" in self.needs


def rdpo_label(noise_rate: float) -> float:
    """Return (1 − ε)/(1 − 2ε), above one: with it the mean loss over flips is DPO's.

    Raises:
        ValueError: ε is 0.5 or more, where labels say nothing.
    """
    if not noise_rate < 0.5:
        raise ValueError(f"rDPO needs a noise rate below 50%, not {noise_rate:.1%}")
    return (1 - noise_rate) / (1 - 2 * noise_rate)


METHODS = {
    "mspo": Method(
        None, "Eq. 5 to 12", options=META_OPTIONS | {"signals"}, needs=frozenset({"clean"})
    ),
    "mspo_static": Method(
        None,
        "section 4.3, Table 3",
        ppl_diff=STARTING_PPL_DIFF,
        options=META_OPTIONS,
        needs=frozenset({"clean"}),
    ),
    "evidence": Method(
        lambda known: (
            EvidenceLabeller(known.noise_rate) if known.evidence_speaks else Constant(1.0)
        ),
        "supervised labels; docs/evidence.md",
        options=frozenset({"noise_rate"}),
        needs=frozenset({"clean", "noise_rate", "evidence"}),
    ),
    "dpo": Method(lambda _: Constant(1.0), "Rafailov et al. 2023, Eq. 2"),
    "gdpo": Method(
        lambda _: AsGiven(GDPO_LABEL),
        "geometric DPO, Furuta et al. 2024; Appendix C",
        given_by="soft_label",
    ),
    "cdpo": Method(
        lambda known: AsGiven(1 - known.noise_rate),
        "conservative DPO, Mitchell 2023",
        loss=CROSS_ENTROPY,
        options=frozenset({"noise_rate"}),
        needs=frozenset({"noise_rate"}),
        given_by="soft_label",
    ),
    "rdpo": Method(
        lambda known: Constant(rdpo_label(known.noise_rate)),
        "robust DPO, Chowdhury et al. 2024",
        loss=CROSS_ENTROPY,
        options=frozenset({"noise_rate"}),
        needs=frozenset({"noise_rate"}),
    ),
    "perpcorrect": Method(
        lambda known: Threshold.fit(known.clean_ppl_diff, known.noise_rate),
        "Kong et al. 2024; Appendix C",
        ppl_diff=STARTING_PPL_DIFF,
        options=frozenset({"noise_rate", "perpcorrect_mode"}),
        needs=frozenset({"clean", "noise_rate"}),
    ),
    "oracle": Method(lambda _: AsGiven(1.0), "DPO on the true labels", given_by="is_flipped"),
}

# The two ways to `perpcorrect`.
PERPCORRECT_MODES = {
    "threshold": METHODS["perpcorrect"],
    "official": Method(
        lambda _: AsGiven(1.0),
        "Kong et al. 2024, as in their repository",
        options=frozenset({"perpcorrect_mode"}),
        needs=frozenset({"clean", "corrected_labels"}),
    ),
}
