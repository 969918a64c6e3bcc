"""Methods of finding wrong labels, each measured against the truth (`study audit`).

Shapes: n training pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from pyarrow.parquet import read_table
from torch import Tensor

from softpref.auditing.audit import audit
from softpref.auditing.result import Audit
from softpref.data.sources import load_pairs
from softpref.data.tokens import tokenize_pairs
from softpref.models.loading import load_tokenizer
from softpref.statistics.calibration import expected_calibration_error
from softpref.study.confident import response_features, self_confidence
from softpref.study.readings import flips_by_uid
from softpref.study.real_pairs import characters
from softpref.training.align import AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.finished import read_record
from softpref.training.labels import read_labels
from softpref.training.metrics import auroc


@dataclass(frozen=True)
class NoisySet:
    """One noisy set whose labels are scored.

    Attributes:
        files: SFT model, noisy and clean pairs, and the output directory of a run.
        config: returns the alignment options of a method.
    """

    files: AlignFiles
    config: Callable[[str], MSPOConfig]

    def align(self, method: str) -> Path:
        """Align by a method and return the run's directory."""
        config = self.config(method)
        config.label_pairs = True  # margins under the finished policy are scores
        align(self.files, config)
        return Path(self.files.output)

    def audit(self) -> Audit:
        """Audit with the SFT model alone."""
        config = self.config("dpo")
        files, length, cache = self.files, config.max_length, config.reference_cache
        return audit(
            files.model, files.train, files.clean, max_length=length, reference_cache=cache,
            batch_size=config.per_device_eval_batch_size,
        )  # fmt: skip


@dataclass(frozen=True)
class _LabelScores:
    """Scores of labels by one method.

    Attributes:
        uids: uids of the pairs.
        values: (n,) higher if the label is more likely right.
        p_correct: (n,) the probability that it is right; None if the method has none.
        noise_rate: estimated share of wrong labels; None if the method has none.
    """

    uids: list[str]
    values: Tensor
    p_correct: Tensor | None = None
    noise_rate: float | None = None


def measure_scorer(scorer: str, case: NoisySet) -> dict[str, float]:
    """Return how well a scorer finds wrong labels, by name of the metric.

    These are `label_auroc`, `average_precision` of the wrong labels, and if the scorer has them,
    `ece` of its probabilities and `noise_rate_error`, estimate minus truth.
    """
    scores = SCORERS[scorer](case)
    truth = flips_by_uid(str(case.files.train))
    is_flipped = torch.tensor([truth[uid] for uid in scores.uids])
    numbers = {
        "label_auroc": auroc(scores.values, ~is_flipped),
        "average_precision": average_precision(-scores.values, is_flipped),
    }
    if scores.p_correct is not None:
        numbers["ece"] = expected_calibration_error(scores.p_correct, ~is_flipped)
    if scores.noise_rate is not None:
        numbers["noise_rate_error"] = scores.noise_rate - float(is_flipped.double().mean())
    return numbers


def average_precision(scores: Tensor, is_positive: Tensor) -> float:
    """Return Σ (R_k − R_{k−1}) P_k over the distinct thresholds k; ties share a threshold.

    Args:
        scores: (n,), higher for positives.
        is_positive: (n,) bool.
    """
    values, index = torch.unique(scores, return_inverse=True)
    positives = torch.zeros(len(values), dtype=torch.float64)
    positives = positives.index_add_(0, index, is_positive.double()).flip(0)
    counts = torch.bincount(index, minlength=len(values)).double().flip(0)
    precision = positives.cumsum(0) / counts.cumsum(0)
    return float((precision * positives).sum() / positives.sum())


def _ppl_diff(case: NoisySet) -> _LabelScores:
    pairs = case.audit().pairs
    return _LabelScores(list(pairs["uid"]), -torch.tensor(pairs["ppl_diff"]))


def _audit(case: NoisySet) -> _LabelScores:
    return _from_audit(case.audit())


def _audit_run(case: NoisySet) -> _LabelScores:
    run, config = case.align("mspo"), case.config("mspo")
    size, cache = config.per_device_eval_batch_size, config.reference_cache
    return _from_audit(audit(run=str(run), batch_size=size, reference_cache=cache))


def _from_audit(result: Audit) -> _LabelScores:
    p_correct = torch.tensor(result.pairs["p_correct"], dtype=torch.float64)
    rank = torch.tensor(result.pairs["rank"]).double()
    uids = list(result.pairs["uid"])
    return _LabelScores(uids, rank, p_correct, float((1 - p_correct).mean()))


def _dpo_margin(case: NoisySet) -> _LabelScores:
    labels = read_labels(case.align("dpo") / "labels.jsonl")
    return _LabelScores(labels["uid"].to_pylist(), torch.tensor(labels["margin"].to_pylist()))


def _official(case: NoisySet) -> _LabelScores:
    run = case.align("perpcorrect")
    history = read_table(run / "label_history.parquet")
    noise = read_record(run)["noise_rate"]
    labels = torch.tensor(history["soft_label"].to_pylist())
    return _LabelScores(history["uid"].to_pylist(), labels, noise_rate=noise["rate"])


def _confident_learning(case: NoisySet) -> _LabelScores:
    tokenizer = load_tokenizer(case.files.model, trust_remote_code=False)
    train, length = case.files.train, case.config("dpo").max_length
    pairs = tokenize_pairs(load_pairs(train).pairs, tokenizer, length, name=str(train)).pairs
    quality, noise_rate = self_confidence(response_features(case.files.model, pairs))
    return _LabelScores(list(pairs["uid"]), quality, noise_rate=noise_rate)


def _longer(case: NoisySet) -> _LabelScores:
    pairs: Dataset = load_pairs(case.files.train).pairs
    responses = zip(pairs["chosen"], pairs["rejected"], strict=True)
    longer_by = [characters(chosen) - characters(rejected) for chosen, rejected in responses]
    return _LabelScores(list(pairs["uid"]), torch.tensor(longer_by).double())


SCORERS: dict[str, Callable[[NoisySet], _LabelScores]] = {
    "ppl_diff": _ppl_diff,
    "audit": _audit,
    "audit_run": _audit_run,
    "dpo_margin": _dpo_margin,
    "perpcorrect_official": _official,
    "confident_learning": _confident_learning,
    "longer": _longer,
}
"""PPLDiff under the SFT model; the audit with it and with an MSPO run; the implicit reward margin
of a DPO run; labels of PerpCorrect's official code; cleanlab's confident learning over the SFT
model's hidden states; the rule that the longer response is better."""
