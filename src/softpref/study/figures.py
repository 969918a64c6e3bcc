"""Figures of a run: what it learned about labels, and the soft labels it trained with."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from softpref.algorithm.labeller import MetaLearner
from softpref.plots import save_figure

RIGHT, WRONG = "#1f6f8b", "#c8553d"
_WIDTH = 5
"""Inches; text of the usual size is then legible on a phone."""


def draw_learned_map(
    meta_learner: MetaLearner, ppl_diff: Tensor, is_flipped: Tensor, path: Path
) -> None:
    """Draw p̂(PPLDiff) over the histograms of PPLDiff of right and of flipped labels (Figure 3a).

    Args:
        meta_learner: V of a finished run.
        ppl_diff: (n,) PPLDiff of the training pairs under the finished policy, nats per token.
        is_flipped: (n,) bool, the truth.
        path: a PNG.
    """
    figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    low, high = (float(q) for q in torch.quantile(ppl_diff, torch.tensor([0.005, 0.995])))
    grid = torch.linspace(low, high, 400)
    with torch.no_grad():
        above.plot(grid, meta_learner(grid), color="black", linewidth=2)
    above.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    above.axvline(0, color="grey", linewidth=0.8, linestyle=":")
    above.set(ylim=(-0.03, 1.03), ylabel="soft label p̂", title="What the meta-learner has learned")
    bins = torch.linspace(low, high, 50).tolist()
    below.hist(ppl_diff[~is_flipped], bins, color=RIGHT, alpha=0.7, label="right labels")
    below.hist(ppl_diff[is_flipped], bins, color=WRONG, alpha=0.7, label="flipped labels")
    below.set(
        ylabel="pairs",
        xlabel="PPLDiff, nats per token\n← the policy agrees with the label\n"
        "the policy contradicts it →",
    )
    below.legend(frameon=False)
    save_figure(figure, path)


def draw_learned_plane(
    evidence: Tensor, margin: Tensor, soft_label: Tensor, is_flipped: Tensor, path: Path
) -> None:
    """Draw p̂ by evidence and margin for right and flipped labels.

    Args:
        evidence: (n,) g of the training pairs before training, nats.
        margin: (n,) h when the pair's soft label was made, nats.
        soft_label: (n,) soft labels.
        is_flipped: (n,) bool, the truth.
        path: a PNG.
    """
    figure = Figure(figsize=(_WIDTH, 6.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, which, title in zip(
        panels, (~is_flipped, is_flipped), ("right labels", "flipped labels"), strict=True
    ):
        x, y, color = (values[which] for values in (evidence, margin, soft_label))
        points = axes.scatter(x, y, 5, color, cmap="coolwarm_r", vmin=0, vmax=1)
        axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axes.axvline(0, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=f"{int(which.sum()):,} {title}", ylabel="margin before its step, nats")
    panels[1].set(xlabel="evidence before training, nats")
    figure.colorbar(points, ax=panels, label="soft label p̂")
    save_figure(figure, path)


def draw_label_curves(step: Tensor, soft_label: Tensor, is_flipped: Tensor, path: Path) -> None:
    """Draw the mean label of right and of flipped pairs over training (Figure 4b).

    Args:
        step: (r,) the step of each soft label.
        soft_label: (r,) soft labels in training.
        is_flipped: (r,) bool, the truth about the pair.
        path: a PNG.
    """
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    steps = step.unique()
    parts = ("right labels", ~is_flipped, RIGHT), ("flipped labels", is_flipped, WRONG)
    for name, part, colour in parts:
        means = [float(soft_label[part & (step == s)].mean()) for s in steps]
        axes.plot(steps, means, color=colour, linewidth=2, label=name)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(ylim=(-0.03, 1.03), xlabel="step", ylabel="mean soft label p̂")
    axes.set_title("The soft labels in training")
    axes.legend(frameon=False)
    save_figure(figure, path)
