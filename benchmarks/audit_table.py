"""Tables and a picture of ways to find wrong labels, from the results of evidence.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

from matplotlib.figure import Figure

from softpref.markup import for_markdown, for_plot, pipes
from softpref.study.real_tables import mean_interval
from softpref.study.tables import paired_difference

OURS, SECOND = "evidence", "confident learning"
MOST_NOISE = 50.0
"""Percent: more cannot be estimated, see softpref.statistics.noise_rate."""
MARKS = (
    ("#000000", "o"), ("#0072b2", "D"), ("#d55e00", "s"),
    ("#009e73", "^"), ("#cc79a7", "v"), ("#999999", "x"),
)  # fmt: skip
"""Of ways in the order of the results; colours after Okabe and Ito."""
ABOUT = """# Finding wrong labels on real pairs

Made by `python -m benchmarks.evidence`: {settings}.

Means over splits, each its own trusted pairs and flips, with Student's 95% interval. Splits share a
file's pairs, so an interval says how much the draw of a split matters, not what another file would
give. {coverage}
"""

Results = Mapping[str, Mapping]
"""By set: `noisy_pairs`, `true_rate` by split, and `ways`, each metric a list over splits."""


def tables(results: Results, settings: Mapping[str, object]) -> str:
    """Return the page."""
    parts = [
        ("AUROC of distinguishing right labels from wrong, × 100", _by_way(results, "auroc")),
        (f"The same, {OURS} minus the other way, paired by split", _differences(results)),
        (
            "Average precision of finding wrong labels, × 100 (chance: the share of wrong labels)",
            _by_way(results, "average_precision"),
        ),
        (f"What {OURS} says of the set", _claims(results)),
        (f"What {SECOND} says of the set", _second_claims(results)),
        ("CPU seconds of a fit, median, without the model's pass", _seconds(results)),
    ]
    named = ", ".join(f"{name} {value}" for name, value in settings.items())
    about = ABOUT.format(settings=for_markdown(named), coverage=_coverage(results))
    return about + "".join(f"\n## {title}\n\n{pipes(rows)}" for title, rows in parts)


def _ways(results: Results) -> list[str]:
    return list(next(iter(results.values()))["ways"])


def _by_way(results: Results, metric: str) -> list[Sequence[str]]:
    ways = _ways(results)
    rows: list[Sequence[str]] = [("set", "noisy pairs", "wrong, %", *ways)]
    for what, of_set in results.items():
        values = [interval(of_set["ways"][way][metric]) for way in ways]
        rows.append(
            (what, str(of_set["noisy_pairs"]), f"{fmean(of_set['true_rate']):.1f}", *values)
        )
    means = [fmean(fmean(s["ways"][way][metric]) for s in results.values()) for way in ways]
    return [*rows, ("mean of sets", "", "", *(f"{mean:.1f}" for mean in means))]


def _differences(results: Results) -> list[Sequence[str]]:
    others = [way for way in _ways(results) if way != OURS]
    rows: list[Sequence[str]] = [("set", *others)]
    for what, of_set in results.items():
        ours = dict(enumerate(of_set["ways"][OURS]["auroc"]))
        cells = []
        for way in others:
            d = paired_difference(ours, dict(enumerate(of_set["ways"][way]["auroc"])))
            ends = f" ({d.low:+.1f} to {d.high:+.1f})" if d.pairs > 1 else ""
            cells.append(f"{d.mean:+.1f}{ends}")
        rows.append((what, *cells))
    return rows


def _claims(results: Results) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [(
        "set", "wrong, %", "estimate, %", "its interval, %", "covers", "narrow enough to tell",
        "evidence speaks", "suspects", "of them wrong, %", "calibration error",
    )]  # fmt: skip
    for what, of_set in results.items():
        said = of_set["ways"][OURS]
        rows.append((
            what, f"{fmean(of_set['true_rate']):.1f}", interval(said["rate"]),
            f"{fmean(said['low']):.0f} to {fmean(said['high']):.0f}", _count(said["covered"]),
            _count(said["told"]), _count(said["speaks"]), f"{fmean(said['suspects']):.0f}",
            interval(said["precision"]), interval(said["ece"]),
        ))  # fmt: skip
    return rows


def _coverage(results: Results) -> str:
    """Return how often the interval holds the true rate, with and without a majority of errors."""
    few, many = [], []
    for of_set in results.values():
        covered = of_set["ways"][OURS]["covered"]
        for true, hit in zip(of_set["true_rate"], covered, strict=True):
            (few if true <= MOST_NOISE else many).append(hit)
    return (
        f"The interval covers the true share in {_count(few)} splits in which at most half of the "
        f"labels are wrong, and in {_count(many)} in which more are: no estimate exceeds 50%."
    )


def _second_claims(results: Results) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("set", "wrong, %", "suspects", "of them wrong, %", "calibration error")
    ]
    for what, of_set in results.items():
        said = of_set["ways"][SECOND]
        rows.append((
            what, f"{fmean(of_set['true_rate']):.1f}", f"{fmean(said['suspects']):.0f}",
            interval(said["precision"]), interval(said["ece"]),
        ))  # fmt: skip
    return rows


def _seconds(results: Results) -> list[Sequence[str]]:
    ways = _ways(results)
    rows: list[Sequence[str]] = [("set", *ways)]
    for what, of_set in results.items():
        rows.append((what, *(f"{median(of_set['ways'][way]['seconds']):.3f}" for way in ways)))
    return rows


def interval(values: Sequence[float | None]) -> str:
    """Return mean ± half of the 95% interval, of the splits that have a value."""
    known = {split: value for split, value in enumerate(values) if value is not None}
    if not known:
        return ""
    over = mean_interval(known)
    missing = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    half = f" ± {over.high - over.mean:.1f}" if over.pairs > 1 else ""
    return f"{over.mean:.1f}{half}{missing}"


def _count(values: Sequence[float]) -> str:
    return f"{sum(values):.0f} of {len(values)}"


def draw(results: Results) -> Figure:
    """Draw AUROC by set, one mark with its interval for each way."""
    ways = _ways(results)
    figure = Figure(figsize=(9, 1.6 + 0.68 * len(results)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    axes = figure.subplots()
    for at, (way, (colour, marker)) in enumerate(zip(ways, MARKS, strict=True)):
        over = [mean_interval(dict(enumerate(s["ways"][way]["auroc"]))) for s in results.values()]
        places = [row + 0.12 * (at - (len(ways) - 1) / 2) for row in range(len(over))]
        axes.errorbar(
            [d.mean for d in over], places, label=way,
            xerr=[d.high - d.mean if d.pairs > 1 else 0 for d in over], color=colour,
            marker=marker, markersize=8 if way == OURS else 6, linestyle="none", elinewidth=1.2,
            capsize=2, zorder=3 if way == OURS else 2,
        )  # fmt: skip
    for row in range(0, len(results), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="black", alpha=0.04, linewidth=0)
    axes.axvline(50, color="grey", linewidth=1, linestyle=":")
    names = [
        f"{for_plot(what)}\n{s['noisy_pairs']} noisy pairs, {fmean(s['true_rate']):.0f}% wrong"
        for what, s in results.items()
    ]
    axes.set_yticks(range(len(results)), names)
    axes.set(xlabel="AUROC × 100 of distinguishing right labels from wrong (50: chance)",
             ylim=(len(results) - 0.5, -0.5))  # fmt: skip
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(ways), frameon=False, columnspacing=1.2)
    return figure
