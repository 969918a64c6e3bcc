"""Further data that a target reads from a finished run: labels, maps, weights, examples.

A reading is plain data in the results file, so that figures can be redrawn after the runs are
deleted.

Shapes: n training pairs; r soft labels in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pyarrow.parquet import read_table
from torch import Tensor

from softpref.algorithm.objective import loss_by_margin, strength
from softpref.data.sources import load_pairs
from softpref.training.finished import read_record
from softpref.training.labels import read_labels
from softpref.training.teacher import load_meta_learner

_BINS = 40


def learned_map(cell: Path) -> dict[str, Any]:
    """Return V over PPLDiff, and histograms of PPLDiff and soft labels (Fig. 3).

    PPLDiff is that of the finished policy, in nats per token.
    """
    labels, is_flipped = _labels(cell)
    ppl_diff, soft_label = labels["ppl_diff"], labels["soft_label"]
    low, high = ppl_diff.quantile(torch.tensor([0.005, 0.995]))
    grid = torch.linspace(float(low), float(high), 100)
    with torch.no_grad():
        learned = load_meta_learner(cell / "run")(grid)

    def histograms(values: Tensor, low: float, high: float) -> dict[str, list[int]]:
        return {
            name: torch.histc(values[part], _BINS, low, high).int().tolist()
            for name, part in (("right", ~is_flipped), ("flipped", is_flipped))
        }

    return {
        "ppl_diff": grid.tolist(),
        "learned": learned.tolist(),
        "ppl_diffs": histograms(ppl_diff, float(low), float(high)),
        "soft_labels": histograms(soft_label, 0.0, 1.0),
    }


def label_curves(cell: Path) -> dict[str, Any]:
    """Return the mean soft label of right and flipped pairs by step (Fig. 4b)."""
    history = read_table(cell / "run" / "label_history.parquet")
    is_flipped = _truth(cell, history["uid"].to_pylist())
    step, soft_label = (torch.tensor(history[name].to_pylist()) for name in ("step", "soft_label"))
    steps = step.unique()

    def means(part: Tensor) -> list[float | None]:
        found = [soft_label[part & (step == s)] for s in steps]
        return [float(labels.mean()) if len(labels) else None for labels in found]

    return {"step": steps.tolist(), "right": means(~is_flipped), "flipped": means(is_flipped)}


def examples(cell: Path) -> dict[str, Any]:
    """Return the best correction and the worst failure (Tables 8 and 9).

    These are the flipped pair and the right pair with the lowest soft label.
    """
    labels, is_flipped = _labels(cell)
    pairs = load_pairs(str(cell / "noisy.jsonl")).pairs
    index = {uid: i for i, uid in enumerate(pairs["uid"])}
    uids = read_labels(cell / "run" / "labels.jsonl")["uid"].to_pylist()

    def lowest(part: Tensor) -> dict[str, Any]:
        at = int(labels["soft_label"].masked_fill(~part, 2.0).argmin())
        texts = pairs[index[uids[at]]]
        numbers = {name: float(labels[name][at]) for name in ("ppl_diff", "soft_label")}
        return {name: texts[name] for name in ("prompt", "chosen", "rejected")} | numbers

    return {"correction": lowest(is_flipped), "failure": lowest(~is_flipped)}


def implicit_weights(cell: Path) -> dict[str, Any]:
    """Return the weight of pairs in training by their PPLDiff at that time (B.1).

        weight = −∂ℓ/∂h / β = s σ(−β s h)

    A positive weight raises the response that is labelled better, a negative one the other. Values
    are means over bins of equal size; PPLDiff is in nats per token.
    """
    history = read_table(cell / "run" / "label_history.parquet")
    is_flipped = _truth(cell, history["uid"].to_pylist())
    ppl_diff, soft_label, margin = (
        torch.tensor(history[name].to_pylist()) for name in ("ppl_diff", "soft_label", "margin")
    )
    beta = read_record(cell / "run")["options"]["beta"]
    weight = -loss_by_margin(margin, strength(soft_label), beta) / beta

    def by_ppl_diff(mask: Tensor) -> dict[str, list[float]]:
        order = mask.nonzero().squeeze(1)[ppl_diff[mask].argsort()]
        bins = [part for part in order.tensor_split(_BINS) if len(part)]
        return {
            "ppl_diff": [float(ppl_diff[part].mean()) for part in bins],
            "weight": [float(weight[part].mean()) for part in bins],
        }

    return {"right": by_ppl_diff(~is_flipped), "flipped": by_ppl_diff(is_flipped)}


def _labels(cell: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Return the columns of `labels.jsonl`, each (n,), and which labels are flipped."""
    labels = read_labels(cell / "run" / "labels.jsonl")
    columns = {name: torch.tensor(labels[name].to_pylist()) for name in ("ppl_diff", "soft_label")}
    return columns, _truth(cell, labels["uid"].to_pylist())


def _truth(cell: Path, uids: list[str]) -> Tensor:
    is_flipped = flips_by_uid(str(cell / "noisy.jsonl"))
    return torch.tensor([is_flipped[uid] for uid in uids])


def flips_by_uid(noisy: str) -> dict[str, bool]:
    """Return whether each pair of a file is flipped, by uid."""
    pairs = load_pairs(noisy).pairs
    return dict(zip(pairs["uid"], pairs["is_flipped"], strict=True))


def noise_rate_estimate(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a run's estimated share of wrong labels by name, or nothing without an estimate."""
    noise = record["noise_rate"]
    return {"noise_rate_estimate": noise["expected"]} if noise else {}
