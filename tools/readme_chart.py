"""Draw README's chart of win rates from the results of the studies.

python tools/readme_chart.py docs/images/win-rates.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from softpref.plots import save_figure
from softpref.study.figures import RIGHT
from softpref.study.real_tables import mean_interval

RESULTS = Path(__file__).parent.parent / "docs" / "results"
WORLDS = {
    "informative world": ("table1", "table1-evidence"),
    "misleading world": ("table1-misleading", "table1-misleading-evidence"),
}
"""Results files of each world; together they hold every method."""
METHODS = {"dpo": "DPO", "mspo": "MSPO", "evidence": "evidence", "oracle": "DPO on true labels"}
SFT = 50.0
"""The win rate of the SFT model against itself, percent."""


def win_rates(world: str, method: str) -> dict[int, float]:
    """Return a method's win rate by seed at 40% flips."""
    found = {}
    for name in WORLDS[world]:
        cells = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["cells"]
        for key, numbers in cells.items():
            if key.startswith(f"{method}-noise40-seed"):
                found[int(key.rsplit("seed", 1)[1])] = numbers["win_rate"]
    return found


def draw() -> Figure:
    """Draw the mean win rate of each method with its 95% interval, one panel per world."""
    figure = Figure(figsize=(8.5, 2.4), layout="constrained")
    rows = ["SFT model", *METHODS.values()]
    for axes, world in zip(figure.subplots(1, 2, sharey=True), WORLDS, strict=True):
        axes.axvline(SFT, color="grey", linewidth=0.8, linestyle=":")
        axes.plot(SFT, 0, "o", color="grey")
        for row, method in enumerate(METHODS, 1):
            rates = {seed: 100 * share for seed, share in win_rates(world, method).items()}
            rate = mean_interval(rates)
            axes.errorbar(
                rate.mean, row, xerr=[[rate.mean - rate.low], [rate.high - rate.mean]],
                fmt="o", color=RIGHT, capsize=3,
            )  # fmt: skip
            axes.annotate(f"{rate.mean:.1f}", (rate.high, row), (6, -4), textcoords="offset points")
        axes.set(title=world, xlim=(45, 102), xlabel="win rate against the SFT model, %")
        axes.set_yticks(range(len(rows)), rows)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    return figure


if __name__ == "__main__":
    save_figure(draw(), Path(sys.argv[1]))
