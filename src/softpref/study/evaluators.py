"""Measurements of a finished run: an evaluator reads its directory and returns named numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch

from softpref.algorithm.objective import geometric_loss
from softpref.data.label_columns import labelled
from softpref.data.sources import load_pairs
from softpref.data.tokens import tokenize_pairs
from softpref.models.loading import load_policy, load_tokenizer, on_accelerator
from softpref.models.scoring import Scorer
from softpref.study.readings import flips_by_uid
from softpref.study.real_pairs import characters
from softpref.training.finished import read_record
from softpref.training.labels import read_labels
from softpref.training.metrics import auroc


class Evaluator(Protocol):
    """Measures the run in a directory that `softpref train` wrote; rates are shares in [0, 1]."""

    def __call__(self, run: Path, /) -> dict[str, float]:
        """Return the run's numbers by name."""


class HeldOutPairs:
    """Accuracy on the pairs given by `--eval`, with the rule that the longer response is better.

    `preference_accuracy` is the share of pairs whose chosen response has the larger implicit reward
    β log π/π_ref. `length_rule_accuracy` is the accuracy of calling the longer response (in
    characters) the better one; a tie counts half.
    """

    def __init__(self, pairs: str) -> None:
        loaded = labelled(load_pairs(pairs).pairs)  # as in the run's own evaluation
        longer = [
            characters(chosen) - characters(rejected)
            for chosen, rejected in zip(loaded["chosen"], loaded["rejected"], strict=True)
        ]
        right = sum(by > 0 for by in longer) + sum(by == 0 for by in longer) / 2
        self._length_rule = right / len(longer)

    def __call__(self, run: Path) -> dict[str, float]:
        """Return both accuracies."""
        return {
            "preference_accuracy": read_record(run)["evaluation"]["eval_rewards/accuracies"],
            "length_rule_accuracy": self._length_rule,
        }


class CleanLoss:
    """DPO's loss on the trusted pairs of a run (R̂ of Eq. 16, Appendix B.2).

    `clean_loss` is the mean over these pairs under the finished policy; `held_out_loss` is the same
    on the pairs given by `--eval`. The first may be lower, since φ was trained on these pairs.

    Args:
        clean: the file of trusted pairs.
        start: the directory of the starting model, which is the reference.
    """

    def __init__(self, clean: str, start: str) -> None:
        self._clean, self._start = clean, start

    def __call__(self, run: Path) -> dict[str, float]:
        """Return both losses."""
        record = read_record(run)
        options = record["options"]
        tokenizer = load_tokenizer(self._start, trust_remote_code=False)
        trusted = labelled(load_pairs(self._clean).pairs)
        pairs = tokenize_pairs(trusted, tokenizer, options["max_length"], name=self._clean).pairs
        policy, reference = (
            Scorer(
                on_accelerator(load_policy(path, trust_remote_code=False)),
                batch_size=options["per_device_eval_batch_size"],
            ).measure(pairs, "clean loss")
            for path in (str(run), self._start)
        )
        log_ratios = [
            getattr(policy, name) - getattr(reference, name)
            for name in ("chosen_logp", "rejected_logp")
        ]
        loss = geometric_loss(log_ratios[0] - log_ratios[1], 1.0, options["beta"])
        held_out = record["evaluation"]["eval_loss"]
        return {"clean_loss": float(loss.mean()), "held_out_loss": held_out}


class LabelQuality:
    """How well a run's beliefs separate right from flipped labels, where the truth is known.

    `label_auroc` is of `p_correct`, which is PPLDiff under the starting policy for a method without
    a meta-learner. `label_mean_right` and `label_mean_flipped` are means of soft labels, if the
    method has them. Undefined numbers are omitted, for example without flips.
    """

    def __init__(self, noisy: str) -> None:
        self._is_flipped = flips_by_uid(noisy)

    def __call__(self, run: Path) -> dict[str, float]:
        """Return AUROC and mean labels, as far as they are defined."""
        labels = read_labels(run / "labels.jsonl")
        is_flipped = torch.tensor([self._is_flipped[uid] for uid in labels["uid"].to_pylist()])
        numbers = {}
        if labels["p_correct"].null_count == 0:
            p_correct = torch.tensor(labels["p_correct"].to_pylist())
            numbers["label_auroc"] = auroc(p_correct, ~is_flipped)
        if labels["soft_label"].null_count == 0:
            soft_label = torch.tensor(labels["soft_label"].to_pylist())
            numbers["label_mean_right"] = float(soft_label[~is_flipped].mean())
            numbers["label_mean_flipped"] = float(soft_label[is_flipped].mean())
        return {name: value for name, value in numbers.items() if not math.isnan(value)}
