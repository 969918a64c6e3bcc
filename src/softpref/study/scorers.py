"""Ways to tell which labels are wrong, each measured against the truth (`study audit`).

Shapes: n training pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from pyarrow.parquet import read_table
from torch import Tensor

from softpref.auditing.audit import Audit, audit
from softpref.data.sources import load_pairs
from softpref.data.tokens import tokenize_pairs
from softpref.models.loading import load_tokenizer
from softpref.statistics.calibration import expected_calibration_error
from softpref.study.confident import label_quality
from softpref.study.readings import flips_by_uid
from softpref.training.align import RUN_RECORD, AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.labels import read_labels
from softpref.training.metrics import auroc


@dataclass(frozen=True)
class NoisySet:
    """One noisy set to be judged.

    Attributes:
        files: SFT model, noisy and clean pairs, and where a run may write.
        config: a method's alignment options.
    """

    files: AlignFiles
    config: Callable[[str], MSPOConfig]

    def align(self, method: str) -> Path:
        """Align by a method; return the run."""
        align(self.files, self.config(method))
        return Path(self.files.output)

    def audit(self) -> Audit:
        """Audit by the SFT model alone."""
        config = self.config("dpo")
        return audit(
            self.files.model, self.files.train, self.files.clean, max_length=config.max_length,
            batch_size=config.per_device_eval_batch_size, reference_cache=config.reference_cache,
        )  # fmt: skip


@dataclass(frozen=True)
class _Judged:
    """What a way says of the pairs that `uids` name.

    Attributes:
        uids: the pairs.
        belief: (n,) higher where the label looks more right.
        p_correct: (n,) the probability that it is right; None where the way knows none.
        noise_rate: share of wrong labels; likewise.
    """

    uids: list[str]
    belief: Tensor
    p_correct: Tensor | None = None
    noise_rate: float | None = None


def measure_scorer(scorer: str, case: NoisySet) -> dict[str, float]:
    """Return how well a way tells wrong labels, by names.

    `label_auroc`; `average_precision` of finding the wrong ones; `ece` of its probabilities and
    `noise_rate_error`, estimate minus truth, of ways that have these.
    """
    judged = SCORERS[scorer](case)
    truth = flips_by_uid(str(case.files.train))
    is_flipped = torch.tensor([truth[uid] for uid in judged.uids])
    numbers = {
        "label_auroc": auroc(judged.belief, ~is_flipped),
        "average_precision": average_precision(-judged.belief, is_flipped),
    }
    if judged.p_correct is not None:
        numbers["ece"] = expected_calibration_error(judged.p_correct, ~is_flipped)
    if judged.noise_rate is not None:
        numbers["noise_rate_error"] = judged.noise_rate - float(is_flipped.double().mean())
    return numbers


def average_precision(scores: Tensor, is_positive: Tensor) -> float:
    """Return Σ (R_k − R_{k−1}) P_k over the distinct thresholds k; tied pairs come together.

    Args:
        scores: (n,), higher for what should be positive.
        is_positive: (n,) bool.
    """
    values, place = torch.unique(scores, return_inverse=True)
    found = torch.zeros(len(values), dtype=torch.float64)
    found = found.index_add_(0, place, is_positive.double()).flip(0)
    taken = torch.bincount(place, minlength=len(values)).double().flip(0)
    precision = found.cumsum(0) / taken.cumsum(0)
    return float((precision * found).sum() / found.sum())


def _ppl_diff(case: NoisySet) -> _Judged:
    done = case.audit()
    return _Judged(list(done.pairs["uid"]), -torch.tensor(done.pairs["ppl_diff"]))


def _audit(case: NoisySet) -> _Judged:
    return _of_audit(case.audit())


def _audit_run(case: NoisySet) -> _Judged:
    run = case.align("mspo")
    config = case.config("mspo")
    return _of_audit(audit(
        run=str(run), batch_size=config.per_device_eval_batch_size,
        reference_cache=config.reference_cache,
    ))  # fmt: skip


def _of_audit(done: Audit) -> _Judged:
    p_correct = torch.tensor(done.pairs["p_correct"], dtype=torch.float64)
    belief = torch.tensor(done.pairs["rank"]).double()
    return _Judged(list(done.pairs["uid"]), belief, p_correct, float((1 - p_correct).mean()))


def _dpo_margin(case: NoisySet) -> _Judged:
    labels = read_labels(case.align("dpo") / "labels.jsonl")
    return _Judged(labels["uid"].to_pylist(), torch.tensor(labels["margin"].to_pylist()))


def _official(case: NoisySet) -> _Judged:
    run = case.align("perpcorrect")
    history = read_table(run / "label_history.parquet")
    record = json.loads((run / RUN_RECORD).read_text(encoding="utf-8"))
    labels = torch.tensor(history["soft_label"].to_pylist())
    return _Judged(history["uid"].to_pylist(), labels, noise_rate=record["noise_rate"]["rate"])


def _confident_learning(case: NoisySet) -> _Judged:
    tokenizer = load_tokenizer(case.files.model, trust_remote_code=False)
    pairs = tokenize_pairs(
        load_pairs(case.files.train).pairs, tokenizer, case.config("dpo").max_length,
        name=str(case.files.train),
    ).pairs  # fmt: skip
    quality, noise_rate = label_quality(case.files.model, pairs)
    return _Judged(list(pairs["uid"]), quality, noise_rate=noise_rate)


def _longer(case: NoisySet) -> _Judged:
    pairs: Dataset = load_pairs(case.files.train).pairs
    by = [len(str(chosen)) - len(str(rejected))
          for chosen, rejected in zip(pairs["chosen"], pairs["rejected"], strict=True)]  # fmt: skip
    return _Judged(list(pairs["uid"]), torch.tensor(by).double())


SCORERS: dict[str, Callable[[NoisySet], _Judged]] = {
    "ppl_diff": _ppl_diff,
    "audit": _audit,
    "audit_run": _audit_run,
    "dpo_margin": _dpo_margin,
    "perpcorrect_official": _official,
    "confident_learning": _confident_learning,
    "longer": _longer,
}
"""PPLDiff under the SFT model; the audit by it and by an MSPO run; the implicit reward margin of a
DPO run; PerpCorrect's authors' labels; cleanlab's confident learning over the SFT model's hidden
states; the rule that the longer response is the better."""
