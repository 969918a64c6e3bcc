"""What a study is made of: cells, one run each, and targets, grids of cells."""

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
        noise_kind: "random", or "difficulty": hard pairs, by the SFT model, at 1.6 times the rate
            and easy ones at 0.4 times, so 40% and 10% at 25%.
        clean_pairs: size of the clean set; None is 150 in the world, and a clean file whole.
        clean_noise_rate: share of the clean set's labels that are flipped.
        noise_rate_source: "estimated" or "given": where cDPO and rDPO have the noise rate from.
        recipe: of the alignment options.
        sft_data: what SFT has seen: "disjoint" pairs, or in a second pass the training pairs'
            responses that are truly better ("clean_chosen") or labelled so ("noisy_chosen").
        model_size: of the world's model: "usual" or "small".
        rival: a method that is run as well, and compared with head to head.
        measure_every: steps between win rates on the way; None: at the end alone.
        perpcorrect_mode: how perpcorrect finds wrong labels; None: by threshold.
        scorer: a way to tell wrong labels that is measured instead of a method.
        pairs: of real pairs, the file by name.
        labels: of real pairs, where training labels come from, instead of noise rate and kind:
            `flips:RATE` or `judge:NAME`.
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
        """The cell's name: method, noise, seed, and whatever else is not the default."""
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
        title: what it shows.
        rows: the axis down the table.
        columns: the axis across.
        axes: values by field of `Cell`.
        paper: the paper's win rates on Golden HH, %, by row and column, as printed.
        paper_model: whose win rates these are.
        metrics: what its tables show, of `tables.METRICS`.
        reading: what is read off each run of a method that makes labels, besides its numbers.
        picture: draws the figure.
        text: says in Markdown what a table cannot.
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

    @property
    def needs_two_sizes(self) -> bool:
        """Whether only the world can run it, which has models of two sizes."""
        return "model_size" in self.axes

    @property
    def needs_win_rates(self) -> bool:
        """Whether it is about nothing but win rates, so that someone must compare answers."""
        return not {"rival", "measure_every"}.isdisjoint(self.axes)

    @property
    def compares_answers(self) -> bool:
        """Whether its runs are compared by their answers, so that a judge would be asked."""
        return "scorer" not in self.axes

    def cells(self, seeds: Sequence[int], **overrides: Sequence[Any] | None) -> list[Cell]:
        """Return the cells for these seeds, an override taking an axis' place.

        Cells of one seed stand together, so that a grid that is cut off leaves whole seeds.
        """
        axes = dict(self.axes) | {name: given for name, given in overrides.items() if given}
        return [
            Cell(seed=seed, **dict(zip(axes, values, strict=True)))
            for seed in seeds
            for values in product(*axes.values())
        ]
