"""Tables of a target: means over seeds with deviations, and paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from softpref.judging.report import mean_and_deviation
from softpref.markup import for_latex, pipes, shortened
from softpref.study.grid import Cell, CellNumbers, Target

METRICS = {
    "win_rate": "win rate against SFT, %",
    "rival_win_rate": "win rate against the rival, %",
    "preference_accuracy": "held-out preference accuracy, %",
    "label_auroc": "label AUROC, %",
    "average_precision": "average precision of finding wrong labels, %",
    "ece": "calibration error of the probabilities, %",
    "noise_rate_error": "estimated minus true share of wrong labels, points",
    "clean_loss": "DPO's loss on the clean pairs, × 100",
    "held_out_loss": "DPO's loss on held-out pairs, × 100",
}
"""Titles of metrics; tables show the number times 100."""
WIN_RATES = ("win_rate", "rival_win_rate")
REFERENCE = "mspo"


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over seeds with its 95% interval, in the metric's unit."""

    mean: float
    low: float
    high: float
    pairs: int


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Return the mean of first minus second over the seeds that both have.

    The interval is Student's: d̄ ± t(n − 1, 97.5%) s / √n; unbounded for one seed.

    Raises:
        ValueError: no seed is in both.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError("no seed has both")
    differences = [first[seed] - second[seed] for seed in seeds]
    n, mean = len(seeds), fmean(differences)
    if n == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    half = float(student.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


Numbers = Mapping[tuple[Any, Any], Mapping[int, float]]
"""Values of one metric by row and column, then by seed."""


def collect(target: Target, cells: Sequence[Cell], results: CellNumbers, metric: str) -> Numbers:
    """Return the values of a metric in all finished cells that have it."""
    numbers: dict[tuple[Any, Any], dict[int, float]] = {}
    for cell in cells:
        if cell.key in results and metric in results[cell.key]:
            place = (getattr(cell, target.rows), getattr(cell, target.columns))
            numbers.setdefault(place, {})[cell.seed] = results[cell.key][metric]
    return numbers


def markdown(target: Target, cells: Sequence[Cell], results: CellNumbers) -> str:
    """Return the page: a table for each metric, and differences of methods to the baseline."""
    parts = [f"# {target.title}\n"]
    for metric in target.metrics:
        name, numbers = METRICS[metric], collect(target, cells, results, metric)
        if not numbers:
            continue
        seeds = sorted({seed for values in numbers.values() for seed in values})
        about = f"Mean ± deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))})."
        if metric in WIN_RATES and target.paper:
            about += f" Beside it the paper's, of {target.paper_model} on Golden HH."
        if metric == "preference_accuracy":
            about += f" {_length_rule(target, cells, results)}"
        parts.append(f"## {name[0].upper()}{name[1:]}\n\n{about}\n")
        paper = target.paper if metric in WIN_RATES else {}
        parts.append(pipes(_grid(target, numbers, paper)))
        if bounds := _bounds(target, cells, results, metric):
            parts.append(bounds)
        differences = _differences(target, numbers)
        if differences:
            what = f"Each minus {target.baseline}" if target.baseline else "MSPO minus each"
            title = f"{what}, paired by seed, points, with 95% interval"
            parts.append(f"{title}:\n\n{pipes(differences)}")
    return "\n".join(parts)


def _bounds(target: Target, cells: Sequence[Cell], results: CellNumbers, metric: str) -> str:
    """Return bounds of win rates, from all failed comparisons lost to all won, if any failed."""
    lost, won = (
        collect(target, cells, results, f"{metric}_if_failures_{what}") for what in ("lost", "won")
    )
    if lost == won:
        return ""
    rows = list(dict.fromkeys(row for row, _ in lost))
    columns = sorted({column for _, column in lost}, key=str)

    def bounds(row: Any, column: Any) -> str:
        if (row, column) not in lost:
            return ""
        low, high = (100 * fmean(ends[row, column].values()) for ends in (lost, won))
        return f"{low:.1f} to {high:.1f}"

    body = [[_value(row), *(bounds(row, column) for column in columns)] for row in rows]
    head = [target.rows.replace("_", " "), *map(_value, columns)]
    return f"The judge failed at some; all of them lost to all won:\n\n{pipes([head, *body])}"


def _length_rule(target: Target, cells: Sequence[Cell], results: CellNumbers) -> str:
    numbers = collect(target, cells, results, "length_rule_accuracy")
    rates = [rate for by_seed in numbers.values() for rate in by_seed.values()]
    return f"Calling the longer response the better one: {100 * fmean(rates):.1f}%."


def latex(target: Target, cells: Sequence[Cell], results: CellNumbers) -> str:
    """Return a LaTeX tabular for each metric."""
    parts = []
    for metric in target.metrics:
        name, numbers = METRICS[metric], collect(target, cells, results, metric)
        if numbers:
            rows = _grid(target, numbers, target.paper if metric in WIN_RATES else {})
            body = " \\\\\n".join(" & ".join(map(for_latex, row)) for row in rows)
            spec = "l" + "r" * (len(rows[0]) - 1)
            begin, end = f"\\begin{{tabular}}{{{spec}}}", "\\end{tabular}"
            parts.append(f"% {name}\n{begin}\n{body} \\\\\n{end}\n")
    return "\n".join(parts)


def _grid(
    target: Target, numbers: Numbers, paper: Mapping[tuple[Any, Any], str]
) -> list[list[str]]:
    rows = list(dict.fromkeys(row for row, _ in numbers))
    columns = sorted({column for _, column in numbers}, key=str)
    head = [target.rows.replace("_", " ")]
    for column in columns:
        head += [_value(column)] + (["paper"] if paper else [])
    body = []
    for row in rows:
        line = [_value(row)]
        for column in columns:
            values = numbers.get((row, column))
            line.append(mean_and_deviation([*values.values()]) if values else "")
            line += [paper.get((row, column), "")] if paper else []
        body.append(line)
    return [head, *body]


def _differences(target: Target, numbers: Numbers) -> list[list[str]]:
    if target.rows != "method":
        return []
    reference = target.baseline or REFERENCE
    columns = sorted({column for row, column in numbers if row == reference}, key=str)
    others = list(dict.fromkeys(row for row, _ in numbers if row != reference))
    if not columns or not others:
        return []
    body = []
    for row in others:
        line = [row]
        for column in columns:
            first, second = numbers[reference, column], numbers.get((row, column), {})
            if not first.keys() & second.keys():
                line.append("")
                continue
            d = paired_difference(*((second, first) if target.baseline else (first, second)))
            line.append(f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})")
        body.append(line)
    head = f"minus {reference}" if target.baseline else "MSPO minus"
    return [[head, *map(_value, columns)], *body]


def _value(value: Any) -> str:
    return f"{value:.0%}" if isinstance(value, float) else shortened(str(value))
