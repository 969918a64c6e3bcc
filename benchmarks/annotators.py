"""Are planted reliabilities of annotators recovered, and do their intervals cover? By simulation.

Five annotators label 400 pairs each; 150 other pairs are trusted. Either all label the same pairs,
or each has its own; or all label the same and the trusted ones too. Evidence is a right label's z
plus a Gaussian of the shift named, or right for 88% whatever its size, or none. Per cent of sets
in which the estimate is within 5 points of the share of labels that are right, and of the planted
probability (the share itself is off by more in 4% of sets at 50%), and in which the interval holds
the planted probability; its median width and the estimate's bias, in points. Tables in Markdown.

    python benchmarks/annotators.py --sets 400
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from softpref.statistics.annotators import Reliability, estimate_reliability

RELIABILITIES = (0.5, 0.6, 0.7, 0.85, 0.95)
PAIRS, TRUSTED, POINTS = 400, 150, 0.05
OWN, SAME, TRUSTED_TOO = "own pairs", "same pairs", "same and trusted pairs"
NONE, SATURATING = "none", "88% right"
EVIDENCE = {"AUROC 98%": 1.5, "AUROC 92%": 1.0, "AUROC 76%": 0.5}
SETTINGS = (
    *((layout, evidence) for layout in (OWN, SAME, TRUSTED_TOO) for evidence in EVIDENCE),
    (OWN, SATURATING),
    (SAME, SATURATING),
    (SAME, NONE),
    (TRUSTED_TOO, NONE),
)


@dataclass(frozen=True)
class Labels:
    """The arguments of `estimate_reliability`, and each annotator's share of right labels, (K,)."""

    content: Tensor
    annotator: Tensor
    side: Tensor
    evidence: Tensor
    truth: Tensor
    share: Tensor

    def estimate(self) -> list[Reliability]:
        """Return what is estimated of each annotator."""
        return estimate_reliability(
            self.content, self.annotator, self.side, self.evidence, self.truth
        )


def strength(evidence: str, count: int, generator: Generator) -> Tensor:
    """Return evidence for the better response, (count,)."""
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    if evidence == NONE:
        return torch.zeros_like(normal)
    if evidence == SATURATING:
        wrong = torch.rand(count, generator=generator) < 0.12
        return torch.where(wrong, -1.0, 1.0) * (normal + 1.2).abs()
    return normal + EVIDENCE[evidence]


def draw(
    layout: str,
    evidence: str,
    seed: int,
    reliabilities: tuple[float, ...] = RELIABILITIES,
    pairs: int = PAIRS,
) -> Labels:
    """Return one set of labels; the trusted contents are the last ones."""
    generator = Generator().manual_seed(seed)
    right, count = torch.tensor(reliabilities, dtype=torch.float64), len(reliabilities)
    contents = pairs * count if layout == OWN else pairs
    labelled = contents + TRUSTED * (layout == TRUSTED_TOO)
    truth = torch.randint(2, (contents + TRUSTED,), generator=generator).double() * 2 - 1
    content = torch.arange(labelled).repeat(1 if layout == OWN else count)
    annotator = torch.arange(len(content)) * count // len(content)
    is_right = torch.rand(len(content), generator=generator) < right[annotator]
    side = torch.where(is_right, 1.0, -1.0) * truth[content]
    found = truth * strength(evidence, len(truth), generator)
    share = is_right.double().reshape(count, -1).mean(1)
    truth[:contents] = 0
    return Labels(content, annotator, side, found, truth, share)


def measured(labels: Labels, planted: Tensor) -> Tensor:
    """Return what is tabled of one set, (5, K)."""
    found = labels.estimate()
    estimate, low, high = (
        torch.tensor([getattr(each, name) for each in found]).double()
        for name in ("estimate", "low", "high")
    )
    near = [(estimate - target).abs() <= POINTS for target in (labels.share, planted)]
    return torch.stack(
        [*near, (low <= planted) & (planted <= high), high - low, estimate - planted]
    )


def main() -> None:
    """Simulate every setting and print the table."""
    parser = argparse.ArgumentParser(description="Recovery of annotators' reliabilities.")
    parser.add_argument("--sets", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    planted = torch.tensor(RELIABILITIES, dtype=torch.float64)
    columns = ("within 5 of share", "within 5 of planted", "covers", "width", "bias")
    print(f"| labels | evidence | reliability | {' | '.join(columns)} |\n|{'---|' * 8}")
    for layout, evidence in SETTINGS:
        sets = tqdm(range(options.sets), f"{layout}, {evidence}", unit="set", disable=None)
        found = torch.stack([measured(draw(layout, evidence, seed), planted) for seed in sets])
        of_all = found.mean(0)
        of_all[3] = found[:, 3].median(0).values
        for rate, values in zip((*RELIABILITIES, None), (*of_all.T, of_all.mean(1)), strict=True):
            name = "mean" if rate is None else f"{rate:.0%}"
            cells = " | ".join(f"{100 * value:.1f}" for value in values.tolist())
            print(f"| {layout} | {evidence} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
