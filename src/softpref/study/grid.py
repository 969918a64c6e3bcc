"""The paper's tables and figures as grids of runs: plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

ALL_METHODS = ("dpo", "gdpo", "cdpo", "rdpo", "perpcorrect", "mspo_static", "mspo", "oracle")
NOISE_RATES = (0.0, 0.1, 0.2, 0.3, 0.4)


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
    """

    method: str
    seed: int
    noise_rate: float = 0.4
    noise_kind: str = "random"
    clean_pairs: int | None = None
    clean_noise_rate: float = 0.0
    noise_rate_source: str = "estimated"
    recipe: str = "recommended"

    @property
    def key(self) -> str:
        """The cell's name: method, noise, seed, and whatever else is not the default."""
        special = [
            f"{f.name.replace('_', '')}{_short(getattr(self, f.name))}"
            for f in fields(self)[3:]
            if getattr(self, f.name) != f.default
        ]
        return "-".join([self.method, f"noise{_short(self.noise_rate)}", *special,
                         f"seed{self.seed}"])  # fmt: skip


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
        paper: the paper's win rates of Llama-2-7B on Golden HH, %, by row and column, as printed.
    """

    title: str
    rows: str
    columns: str
    axes: Mapping[str, Sequence[Any]]
    paper: Mapping[tuple[Any, Any], str] = field(default_factory=dict)

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


def _by_noise(rows: Mapping[str, str]) -> dict[tuple[str, float], str]:
    return {
        (method, rate): number
        for method, numbers in rows.items()
        for rate, number in zip(NOISE_RATES, numbers.split(), strict=True)
    }


TARGETS = {
    "table1": Target(
        "Methods by noise rate (Table 1)",
        "method", "noise_rate", {"method": ALL_METHODS, "noise_rate": NOISE_RATES},
        _by_noise({
            "dpo": "97.2±0.4 92.5±0.6 82.6±1.1 68.5±1.5 53.2±2.0",
            "gdpo": "97.6±0.3 97.2±0.4 95.5±0.5 94.3±0.6 91.2±0.9",
            "cdpo": "97.4±0.3 96.0±0.5 90.9±0.8 83.2±1.0 65.6±1.8",
            "rdpo": "97.2±0.4 96.7±0.4 95.2±0.6 93.9±0.7 90.5±1.0",
            "perpcorrect": "97.9±0.3 97.5±0.3 96.2±0.5 95.5±0.5 94.9±0.6",
            "mspo": "98.4±0.2 97.9±0.2 96.6±0.4 96.3±0.4 96.1±0.5",
        }),
    ),
    "table3": Target(
        "What learning and the dynamic signal add (Table 3)",
        "method", "noise_rate",
        {"method": ("perpcorrect", "mspo_static", "mspo"), "noise_rate": (0.3,)},
        {("perpcorrect", 0.3): "95.5±0.5", ("mspo_static", 0.3): "95.9±0.4",
         ("mspo", 0.3): "96.3±0.4"},
    ),
    "table4": Target(
        "Flips that depend on difficulty (Table 4)",
        "method", "noise_kind",
        {"method": ALL_METHODS, "noise_kind": ("difficulty",), "noise_rate": (0.25,)},
        {("dpo", "difficulty"): "61.3±1.8", ("cdpo", "difficulty"): "75.8±1.2",
         ("perpcorrect", "difficulty"): "93.1±0.7", ("mspo", "difficulty"): "95.2±0.5"},
    ),
    "table7": Target(
        "MSPO with noise in the clean set (Table 7)",
        "clean_noise_rate", "method",
        {"clean_noise_rate": (0.0, 0.05, 0.1, 0.15), "method": ("mspo",), "noise_rate": (0.3,)},
        {(0.0, "mspo"): "96.3±0.4", (0.05, "mspo"): "95.8±0.5", (0.1, "mspo"): "95.1±0.6",
         (0.15, "mspo"): "94.2±0.8"},
    ),
    "fig5": Target(
        "MSPO by the size of the clean set (Figure 5)",
        "clean_pairs", "method",
        {"clean_pairs": (50, 100, 150, 200), "method": ("mspo",), "noise_rate": (0.3,)},
    ),
    "rates": Target(
        "cDPO and rDPO with the noise rate estimated and given",
        "method", "noise_rate_source",
        {"method": ("cdpo", "rdpo"), "noise_rate_source": ("estimated", "given"),
         "noise_rate": (0.4,)},
    ),
}  # fmt: skip
"""What `softpref study` can be asked for."""
