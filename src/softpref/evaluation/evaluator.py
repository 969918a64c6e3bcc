"""What is measured of a finished run: every evaluator turns its directory into named numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Protocol

import torch
from pyarrow.json import read_json

from softpref.data.sources import load_pairs
from softpref.training.metrics import auroc


class Evaluator(Protocol):
    """Measures the run in a directory that `softpref train` wrote; rates are shares in [0, 1]."""

    def __call__(self, run: Path, /) -> dict[str, float]:
        """Return the run's numbers by name."""


class HeldOutPairs:
    """Accuracy on the pairs a run was given by `--eval`, with the rule of the longer response.

    `preference_accuracy` is the share of pairs whose chosen response has the larger implicit reward
    β log π/π_ref; `length_rule_accuracy` is what calling the longer response (in characters) the
    better one would score, a tie counting half.
    """

    def __init__(self, pairs: str) -> None:
        loaded = load_pairs(pairs).pairs
        longer = [
            _characters(chosen) - _characters(rejected)
            for chosen, rejected in zip(loaded["chosen"], loaded["rejected"], strict=True)
        ]
        right = sum(by > 0 for by in longer) + sum(by == 0 for by in longer) / 2
        self._length_rule = right / len(longer)

    def __call__(self, run: Path) -> dict[str, float]:
        """Return both accuracies."""
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        return {
            "preference_accuracy": record["evaluation"]["eval_rewards/accuracies"],
            "length_rule_accuracy": self._length_rule,
        }


def _characters(response: str | list[dict[str, str]]) -> int:
    if isinstance(response, str):
        return len(response)
    return sum(len(message["content"]) for message in response)


class LabelQuality:
    """How well a run's beliefs part right from flipped labels, where the truth is known.

    `label_auroc` is that of `p_correct`, so for a method without a meta-learner that of PPLDiff
    under the starting policy; `label_mean_right` and `label_mean_flipped` are of soft labels, of
    methods that make them. A number that cannot be had, as without flips, is left out.
    """

    def __init__(self, noisy: str) -> None:
        pairs = load_pairs(noisy).pairs
        self._is_flipped = dict(zip(pairs["uid"], pairs["is_flipped"], strict=True))

    def __call__(self, run: Path) -> dict[str, float]:
        """Return what can be had of AUROC and mean labels."""
        labels = read_json(run / "labels.jsonl")
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
