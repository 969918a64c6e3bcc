"""The methods as data: whose labels, from what, in which loss, and what they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from softpref.algorithm.evidence_labeller import EvidenceLabeller
from softpref.algorithm.labeller import AsGiven, Labeller, Threshold
from softpref.algorithm.objective import CROSS_ENTROPY, GEOMETRIC, PairLoss
from softpref.algorithm.posterior_labeller import PosteriorLabeller
from softpref.algorithm.robust_losses import HOLDER, ROPO, SIGMOID, SQUARED
from softpref.algorithm.signals import PPL_DIFF, STARTING_PPL_DIFF, Signal

MethodName = Literal[
    "mspo", "mspo_static", "evidence", "dpo", "gdpo", "cdpo", "rdpo", "perpcorrect",
    "ipo", "dr_dpo", "sympo", "holder_dpo", "ropo", "re_po", "oracle",
]  # fmt: skip
GDPO_LABEL = 0.9
DR_DPO_TEMPERATURE = 1.0


@dataclass(frozen=True)
class KnownBeforeTraining:
    """What is known before the first step.

    Attributes:
        noise_rate: the share of flipped labels, given or estimated; NaN where it is neither.
        clean_ppl_diff: (n,) PPLDiff of the clean pairs under the starting policy; empty without.
        evidence_speaks: whether signals distinguish right labels from wrong; False if not asked.
        beta: β of the loss, 1/nats.
        annotators: how many annotators the training pairs name.
    """

    noise_rate: float
    clean_ppl_diff: Tensor
    evidence_speaks: bool = False
    beta: float = 0.1
    annotators: int = 0


@dataclass(frozen=True)
class Method:
    """One way to align: the step of bilevel.py with this loss and these labels.

    Attributes:
        name: what `--method` calls it.
        make_labeller: makes who says how far to believe a pair; None is a meta-learner, taught in
            training.
        source: where the method comes from.
        ppl_diff: the PPLDiff that is recorded beside the labels, and that a meta-learner sees
            unless `--signals` says otherwise.
        loss: what is made of margin and label.
        temperature: τ, nats, where pairs of a large loss count less; None for the plain mean.
        needs: what must be known of the training set: its `noise_rate`, a `clean` set beside it,
            `corrected_labels` that rounds of surrogates made, `evidence` from signals.
        given_by: the column that holds the labels where pairs bring their own; required of
            `is_flipped`, optional of `soft_label`.
        reads: the optional columns of training pairs that it reads; `votes` and `scores` are two.
    """

    name: str
    make_labeller: Callable[[KnownBeforeTraining], Labeller] | None
    source: str
    ppl_diff: Signal = PPL_DIFF
    loss: PairLoss = GEOMETRIC
    needs: frozenset[str] = frozenset()
    given_by: str | None = None
    temperature: float | None = None
    reads: frozenset[str] = frozenset({"weight"})

    @property
    def teaches(self) -> bool:
        """Whether the labeller learns from the clean pairs while the policy trains."""
        return self.make_labeller is None

    @property
    def doubts(self) -> bool:
        """Whether single labels are doubted in training, so that the policy may judge them."""
        return self.teaches or "evidence" in self.needs or "annotator" in self.reads


def rdpo_label(noise_rate: float) -> float:
    """Return (1 − ε)/(1 − 2ε), above one: with it the mean loss over flips is DPO's.

    Raises:
        ValueError: ε is 0.5 or more, where labels say nothing.
    """
    if not noise_rate < 0.5:
        raise ValueError(f"rDPO needs a noise rate below 50%, not {noise_rate:.1%}")
    return (1 - noise_rate) / (1 - 2 * noise_rate)


def _trusting(name: str, source: str, **differs: Any) -> Method:
    """Return a method that takes each label at its word, and so may be given a target margin."""
    reads = frozenset({"weight", "margin"})
    return Method(name, lambda _: AsGiven(1.0), source, reads=reads, **differs)


_CLEAN = frozenset({"clean"})
_SOFT_LABELS = frozenset({"weight", "soft_label", "votes", "scores"})
_ROWS = (
    Method("mspo", None, "Eq. 5 to 12", needs=_CLEAN),
    Method("mspo_static", None, "section 4.3, Table 3", STARTING_PPL_DIFF, needs=_CLEAN),
    Method(
        "evidence",
        lambda known: EvidenceLabeller(known.noise_rate) if known.evidence_speaks else AsGiven(1.0),
        "supervised labels; docs/evidence.md",
        needs=frozenset({"clean", "noise_rate", "evidence"}),
    ),
    _trusting("dpo", "Rafailov et al. 2023, Eq. 2"),
    Method(
        "gdpo",
        lambda _: AsGiven(GDPO_LABEL),
        "geometric DPO, Furuta et al. 2024; Appendix C",
        given_by="soft_label",
        reads=_SOFT_LABELS,
    ),
    Method(
        "cdpo",
        lambda known: AsGiven(1 - known.noise_rate),
        "conservative DPO, Mitchell 2023",
        loss=CROSS_ENTROPY,
        needs=frozenset({"noise_rate"}),
        given_by="soft_label",
        reads=_SOFT_LABELS,
    ),
    Method(
        "rdpo",
        lambda known: AsGiven(rdpo_label(known.noise_rate)),
        "robust DPO, Chowdhury et al. 2024",
        loss=CROSS_ENTROPY,
        needs=frozenset({"noise_rate"}),
    ),
    Method(
        "perpcorrect",
        lambda known: Threshold.fit(known.clean_ppl_diff, known.noise_rate),
        "Kong et al. 2024; Appendix C",
        ppl_diff=STARTING_PPL_DIFF,
        needs=frozenset({"clean", "noise_rate"}),
    ),
    _trusting("ipo", "Azar et al. 2023, Eq. 17", loss=SQUARED),
    _trusting("dr_dpo", "Dr. DPO, Wu et al. 2024", temperature=DR_DPO_TEMPERATURE),
    _trusting("sympo", "symmetric loss, Nishimori et al. 2025", loss=SIGMOID),
    _trusting("holder_dpo", "Hölder-DPO, Fujisawa et al. 2025", loss=HOLDER),
    _trusting("ropo", "the loss of ROPO, Liang et al. 2025", loss=ROPO),
    Method(
        "re_po",
        lambda known: PosteriorLabeller(known.beta, known.annotators),
        "RE-PO, Cao et al. 2026",
        loss=CROSS_ENTROPY,
        reads=frozenset({"weight", "annotator"}),
    ),
    Method("oracle", lambda _: AsGiven(1.0), "DPO on the true labels", given_by="is_flipped"),
)
METHODS = {method.name: method for method in _ROWS}

# The two ways to `perpcorrect`.
PERPCORRECT_MODES = {
    "threshold": METHODS["perpcorrect"],
    "official": Method(
        "perpcorrect",
        lambda _: AsGiven(1.0),
        "Kong et al. 2024, as in their repository",
        needs=frozenset({"clean", "corrected_labels"}),
    ),
}
