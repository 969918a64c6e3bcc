"""Parts of a study: cells, one run each, and targets, which are grids of cells."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

CellNumbers = Mapping[str, Mapping[str, Any]]
"""Numbers by name, by the key of their cell."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        method: one of `METHODS`.
        seed: of data, flips and training.
        noise_rate: share of training labels that are flipped.
        noise_kind: "random", or "difficulty": pairs that are hard for the SFT model at 1.6 times
            the rate and easy ones at 0.4 times, so 40% and 10% at 25%.
        clean_pairs: size of the clean set; None is 150 in the world, else the whole file.
        clean_noise_rate: share of the clean set's labels that are flipped.
        noise_rate_source: "estimated" or "given": the source of the noise rate of cDPO and rDPO.
        recipe: recipe of the alignment options.
        sft_data: training data of SFT: "disjoint" pairs, or in a second pass the training pairs'
            responses that are truly better ("clean_chosen") or labelled so ("noisy_chosen").
        model_size: size of the world's model: "usual" or "small".
        rival: a second method to run and compare with head to head.
        measure_every: steps between win rates during training; None: at the end only.
        perpcorrect_mode: how perpcorrect finds wrong labels; None: by threshold.
        scorer: a method of finding wrong labels, measured instead of a training method.
        pairs: name of the file, for real pairs.
        labels: source of the training labels of real pairs, `flips:RATE` or `judge:NAME`, instead
            of noise rate and kind.
    """

    method: str
    seed: int
    noise_rate: float = 0.4
    noise_kind: str = "random"
    clean_pairs: int | None = None
    clean_noise_rate: float = 0.0
    noise_rate_source: str = "estimated"
    recipe: str = "recommended"
    sft_data: str = "disjoint"
    model_size: str = "usual"
    rival: str | None = None
    measure_every: int | None = None
    perpcorrect_mode: str | None = None
    scorer: str | None = None
    pairs: str | None = None
    labels: str | None = None

    @property
    def key(self) -> str:
        """The cell's name: method, noise, seed, and all values that are not defaults."""
        if self.pairs and self.labels:
            labels = re.sub(r"[^\w.-]", "_", self.labels)
            return f"{self.method}-{self.pairs}-{labels}-seed{self.seed}"
        special = [
            f"{f.name.replace('_', '')}{_short(getattr(self, f.name))}"
            for f in fields(self)[3:]
            if getattr(self, f.name) != f.default
        ]
        return "-".join(
            [self.method, f"noise{_short(self.noise_rate)}", *special, f"seed{self.seed}"]
        )


def _short(value: Any) -> str:
    return f"{100 * value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Target:
    """A table or figure: every combination of `axes`, shown as rows by columns.

    Attributes:
        title: title of the page.
        rows: the field of `Cell` in the rows.
        columns: the field of `Cell` in the columns.
        axes: values by field of `Cell`.
        paper: the paper's win rates on Golden HH, %, by row and column, as printed.
        paper_model: the model of these win rates.
        metrics: metrics of its tables, keys of `tables.METRICS`.
        reading: returns further data from each run of a method that makes labels.
        picture: draws the figure.
        text: returns further Markdown.
        baseline: method that all others are compared with; by default MSPO is, with each.
    """

    title: str
    rows: str
    columns: str
    axes: Mapping[str, Sequence[Any]]
    paper: Mapping[tuple[Any, Any], str] = field(default_factory=dict)
    paper_model: str = "Llama-2-7B"
    metrics: Sequence[str] = ("win_rate", "preference_accuracy", "label_auroc")
    reading: Callable[[Path], dict[str, Any]] | None = None
    picture: Callable[[Sequence[Cell], CellNumbers], Figure] | None = None
    text: Callable[[Sequence[Cell], CellNumbers], str] | None = None
    baseline: str | None = None

    @property
    def compares_answers(self) -> bool:
        """Whether it compares answers, so that a judge can be used."""
        return "scorer" not in self.axes

    def cells(self, seeds: Sequence[int], **overrides: Sequence[Any] | None) -> list[Cell]:
        """Return the cells for these seeds; an override replaces an axis.

        Cells are grouped by seed, so that an interrupted grid has complete seeds.
        """
        axes = dict(self.axes) | {name: given for name, given in overrides.items() if given}
        return [
            Cell(seed=seed, **dict(zip(axes, values, strict=True)))
            for seed in seeds
            for values in product(*axes.values())
        ]
