"""The paper's figures, drawn from the results of a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softpref.markup import pipes
from softpref.study.figures import RIGHT, WRONG
from softpref.study.grid import Cell, CellNumbers

_COLOURS = ("#c8553d", "#c9a227", "#1f6f8b", "#5b8c5a", "#7a5195")
_PPL_DIFF = "PPLDiff, nats per token\n← the policy agrees with the label   contradicts it →"
_EXAMPLE_COLUMNS = "seed|prompt|labelled better|labelled worse|PPLDiff, nats per token|soft label"
_PARTS = (("right", "right labels", RIGHT), ("flipped", "flipped labels", WRONG))


def draw_map_and_labels(cells: Sequence[Cell], results: CellNumbers) -> Figure:
    """Draw V over PPLDiff, one line per seed, and the soft labels of right and flipped pairs."""
    readings = _readings(cells, results)
    figure, (left, right) = _two_panels()
    for reading in readings:
        left.plot(reading["ppl_diff"], reading["learned"], color="black", linewidth=1, alpha=0.6)
    left.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    left.axvline(0, color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel=_PPL_DIFF, ylabel="soft label p̂", ylim=(-0.03, 1.03), title="(a) the map")
    for part, name, colour in _PARTS:
        counts = [
            sum(bins) for bins in zip(*(r["soft_labels"][part] for r in readings), strict=True)
        ]
        edges = [i / len(counts) for i in range(len(counts) + 1)]
        right.stairs(counts, edges, fill=True, color=colour, alpha=0.6, label=name)
    right.set(xlabel="soft label p̂", ylabel=f"pairs of {_seeds(readings)}", yscale="log")
    right.set_title("(b) the labels")
    right.legend(frameon=False)
    return figure


def draw_progress(cells: Sequence[Cell], results: CellNumbers) -> Figure:
    """Draw win rate by step, mean and deviation over seeds, and MSPO's mean labels by step."""
    figure, (left, right) = _two_panels()
    for method, colour in zip(dict.fromkeys(cell.method for cell in cells), _COLOURS, strict=False):
        curves = [
            _win_rates(results[c.key]) for c in cells if c.method == method and c.key in results
        ]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        means = [100 * fmean(curve[step] for curve in curves) for step in steps]
        spread = [_deviation([100 * curve[step] for curve in curves]) for step in steps]
        left.plot(steps, means, color=colour, linewidth=2, label=method)
        left.fill_between(steps, *_band(means, spread), color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="win rate against SFT, %", title="(a) answers")
    left.legend(frameon=False)
    readings = _readings(cells, results)
    for part, name, colour in _PARTS:
        for i, reading in enumerate(readings):
            label, x, y = None if i else name, reading["step"], reading[part]
            right.plot(x, y, color=colour, linewidth=1, alpha=0.6, label=label)
    right.set(xlabel="step", ylabel="mean soft label p̂", ylim=(-0.03, 1.03))
    right.set_title(f"(b) MSPO's labels, {_seeds(readings)}")
    if readings:
        right.legend(frameon=False)
    return figure


def draw_clean_sizes(cells: Sequence[Cell], results: CellNumbers) -> Figure:
    """Draw the win rate, mean and deviation over seeds, by the size of the clean set."""
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    _by_size(axes, cells, results, "win_rate", "#1f6f8b", "MSPO")
    axes.set(xlabel="clean pairs", ylabel="win rate against SFT, %")
    return figure


def draw_bound(cells: Sequence[Cell], results: CellNumbers) -> Figure:
    """Draw the loss of clean and held-out pairs by the size of the clean set."""
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    _by_size(axes, cells, results, "clean_loss", WRONG, "clean pairs")
    _by_size(axes, cells, results, "held_out_loss", RIGHT, "held-out pairs")
    axes.set(xlabel="clean pairs", ylabel="DPO's loss, × 100")
    axes.legend(frameon=False)
    return figure


def draw_weights(cells: Sequence[Cell], results: CellNumbers) -> Figure:
    """Draw the weight of pairs in training by their PPLDiff at that time."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    readings = _readings(cells, results)
    for part, name, colour in _PARTS:
        for i, reading in enumerate(readings):
            label, x, y = None if i else name, reading[part]["ppl_diff"], reading[part]["weight"]
            axes.plot(x, y, ".", color=colour, alpha=0.6, label=label)
    axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel=_PPL_DIFF, ylabel="weight s σ(−β s h)\n← reverses the label   follows it →")
    axes.set_title(f"Means over bins of equal size, {_seeds(readings)}")
    axes.legend(frameon=False)
    return figure


def describe_examples(cells: Sequence[Cell], results: CellNumbers) -> str:
    """Return Markdown with the best correction and the worst failure of every seed."""
    titles = {
        "correction": "Best correction: a flipped label, reversed",
        "failure": "Worst failure: a right label, doubted most",
    }
    parts = []
    for kind, title in titles.items():
        rows = [tuple(_EXAMPLE_COLUMNS.split("|"))]
        for cell in cells:
            if cell.key in results:
                reading = results[cell.key]["reading"][kind]
                texts = (reading[name] for name in ("prompt", "chosen", "rejected"))
                numbers = f"{reading['ppl_diff']:+.2f}", f"{reading['soft_label']:.3f}"
                rows.append((str(cell.seed), *texts, *numbers))
        parts.append(f"## {title}\n\n{pipes(rows)}")
    return "\n".join(parts)


def _two_panels() -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    return figure, (left, right)


def _readings(cells: Sequence[Cell], results: CellNumbers) -> list[Mapping[str, Any]]:
    found = (results.get(cell.key, {}).get("reading") for cell in cells)
    return [reading for reading in found if reading]


def _seeds(readings: Sequence[Any]) -> str:
    return f"{len(readings)} seeds" if len(readings) > 1 else "one seed"


def _win_rates(numbers: Mapping[str, Any]) -> dict[int, float]:
    """Return win rates by step; the policy of step 0 is the SFT model."""
    mark = "win_rate_at_"
    measured = {int(n.removeprefix(mark)): rate for n, rate in numbers.items() if mark in n}
    return {0: 0.5} | measured


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _band(means: Sequence[float], spread: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = list(zip(means, spread, strict=True))
    return [m - s for m, s in pairs], [m + s for m, s in pairs]


def _by_size(
    axes: Axes, cells: Sequence[Cell], results: CellNumbers, metric: str, colour: str, name: str
) -> None:
    values: dict[int, list[float]] = {}
    for cell in cells:
        if metric in results.get(cell.key, {}):
            values.setdefault(cell.clean_pairs or 0, []).append(100 * results[cell.key][metric])
    sizes = sorted(values)
    means = [fmean(values[size]) for size in sizes]
    spread = [_deviation(values[size]) for size in sizes]
    axes.errorbar(sizes, means, spread, color=colour, marker="o", capsize=3, label=name)
