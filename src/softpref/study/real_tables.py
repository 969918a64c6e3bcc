"""The page of a study on real pairs: methods compared with DPO, by file and labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from softpref.markup import for_markdown, for_plot, pipes, shortened
from softpref.study.grid import Cell, CellNumbers
from softpref.study.tables import Difference, paired_difference

POWER = 0.8
ACCURACY = "preference_accuracy"
BASELINE, CEILING = "dpo", "oracle"
ABOUT = """
Held-out accuracy is the share of test pairs, rightly labelled, of which training raised the better
response's log-probability by more than the worse one's: DPO's implicit reward, 50% before the
first step by definition. Means over seeds, each its own split and labels, with Student's 95%
interval; of a single seed the interval is a bootstrap over prompts. Seeds share a file's pairs, so
these intervals speak of this file. *Gain kept*: (accuracy − 50) of the method over that of the
oracle, DPO on true labels. *To separate*: seeds, and test pairs in all, that would find a true
difference of the observed size in 80% of cases, n = ((1.96 + 0.84) s / d)², s the differences'
deviation over seeds. *Label AUROC* is of the mean soft label that a pair was trained with; *says*
is the estimated share of wrong labels.
"""
HEAD = (
    *("method", "seeds", "accuracy, %", "gain kept", "minus DPO, points", "to separate"),
    *("label AUROC, %", "says, %", "CPU minutes"),
)

Run = Mapping[str, Any]
Runs = dict[str, dict[int, Run]]
"""Numbers by method and seed."""


def describe(cells: Sequence[Cell], results: CellNumbers) -> str:
    """Return a table for each combination of file and labels that has a finished cell."""
    parts = [ABOUT]
    for (pairs, labels), runs in _by_set(cells, results).items():
        title = for_markdown(f"{shortened(_short(pairs))}, {shortened(labels)}")
        parts.append(f"\n## {title}\n\n{_about(runs)}\n\n{pipes(_rows(runs))}")
    return "".join(parts)


APART = 0.08
"""Between the marks of two methods, as a share of the distance between two sources of labels."""


def draw_accuracy(cells: Sequence[Cell], results: CellNumbers) -> Figure:
    """Draw accuracy by labels, with one panel per file."""
    by_set = _by_set(cells, results)
    files = list(dict.fromkeys(pairs for pairs, _ in by_set))
    figure = Figure(figsize=(6 * len(files), 4), layout="constrained")
    for axes, pairs in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        sets = {labels: runs for (file, labels), runs in by_set.items() if file == pairs}
        methods = list(dict.fromkeys(method for runs in sets.values() for method in runs))
        for i, method in enumerate(methods):
            aside = APART * (i - (len(methods) - 1) / 2)
            found = [
                (place + aside, mean_interval(_values(runs[method], ACCURACY)))
                for place, runs in enumerate(sets.values())
                if method in runs
            ]
            places = [place for place, _ in found]
            means = [100 * d.mean for _, d in found]
            half = [100 * (d.high - d.mean) if d.pairs > 1 else 0 for _, d in found]
            axes.errorbar(places, means, half, label=method, marker="o", capsize=3)
        axes.axhline(50, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=for_plot(_short(pairs)), ylabel="held-out accuracy, %")
        axes.set_xticks(range(len(sets)), [for_plot(labels) for labels in sets])
        axes.legend(frameon=False)
    return figure


def _by_set(cells: Sequence[Cell], results: CellNumbers) -> dict[tuple[str, str], Runs]:
    found: dict[tuple[str, str], Runs] = {}
    for cell in cells:
        if cell.key in results:
            runs = found.setdefault((str(cell.pairs), str(cell.labels)), {})
            runs.setdefault(cell.method, {})[cell.seed] = results[cell.key]
    return dict(sorted(found.items()))


def _short(pairs: str) -> str:
    return pairs.partition("@")[0]


def _values(runs: Mapping[int, Run], name: str) -> dict[int, float]:
    return {seed: run[name] for seed, run in runs.items() if name in run}


def _about(runs: Runs) -> str:
    every = {seed: run for by_seed in runs.values() for seed, run in by_seed.items()}

    def mean(name: str) -> float:
        return fmean(_values(every, name).values())

    return (
        f"Seeds {', '.join(map(str, sorted(every)))}; {mean('train_pairs'):.0f} training pairs, "
        f"{100 * mean('noise_rate'):.1f}% labelled wrongly; {mean('test_pairs'):.0f} test pairs of "
        f"{mean('test_prompts'):.0f} prompts. Calling the longer response the better one: "
        f"{100 * mean('length_rule_accuracy'):.1f}%; the one that the model finds likelier before "
        f"training: {100 * mean('start_sum_accuracy'):.1f}% by summed and "
        f"{100 * mean('start_mean_accuracy'):.1f}% by mean log-probability."
    )


def _rows(runs: Runs) -> list[Sequence[str]]:
    accuracy = {method: _values(by_seed, ACCURACY) for method, by_seed in runs.items()}
    base, ceiling = accuracy.get(BASELINE, {}), accuracy.get(CEILING, {})
    rows: list[Sequence[str]] = [HEAD]
    for method, by_seed in runs.items():
        found = accuracy[method]
        difference = ("", "") if method == BASELINE else _minus_dpo(found, base, by_seed)
        means = (_mean(_values(by_seed, name)) for name in ("label_auroc", "noise_rate_estimate"))
        minutes = fmean(_values(by_seed, "cpu_seconds").values()) / 60
        kept = gain_kept(found, ceiling)
        numbers = (str(len(by_seed)), _accuracy(by_seed), kept, *difference, *means)
        rows.append([method, *numbers, f"{minutes:.1f}"])
    return rows


def mean_interval(values: Mapping[int, float]) -> Difference:
    """Return the mean over seeds with Student's 95% interval."""
    return paired_difference(values, dict.fromkeys(values, 0.0))


def _accuracy(by_seed: Mapping[int, Run]) -> str:
    over = mean_interval(_values(by_seed, ACCURACY))
    ends = over.low, over.high
    if over.pairs == 1:
        (run,) = by_seed.values()
        ends = run[f"{ACCURACY}_low"], run[f"{ACCURACY}_high"]
    return f"{100 * over.mean:.1f} ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})"


def gain_kept(found: Mapping[int, float], ceiling: Mapping[int, float]) -> str:
    """Return the share of the oracle's gain over 50%, over the seeds that both have, as text."""
    both = found.keys() & ceiling.keys()
    if not both:
        return ""
    gain, full = (fmean(values[seed] for seed in both) - 0.5 for values in (found, ceiling))
    return f"{gain / full:.0%}" if full > 0 else "none to keep"


def _minus_dpo(
    found: Mapping[int, float], base: Mapping[int, float], by_seed: Mapping[int, Run]
) -> tuple[str, str]:
    """Return the difference to DPO, and the sample size that would detect it."""
    both = sorted(found.keys() & base.keys())
    if not both:
        return "", ""
    d = paired_difference(found, base)
    if len(both) == 1:
        return f"{100 * d.mean:+.1f} (one seed)", ""
    text = f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
    if not d.low <= 0 <= d.high:
        return text, "separated"
    seeds = seeds_to_detect(d.mean, stdev(found[seed] - base[seed] for seed in both))
    if seeds is None:
        return text, "no difference"
    pairs = seeds * fmean(_values(by_seed, "test_pairs").values())
    return text, f"{seeds:,} seeds, {pairs:,.0f} pairs"


def seeds_to_detect(difference: float, deviation: float) -> int | None:
    """Return the number of seeds that detect a mean difference with power 80% at a two-sided 5%.

    Return None if the difference is zero.
    """
    if difference == 0:
        return None
    normal = NormalDist()
    z = normal.inv_cdf(0.975) + normal.inv_cdf(POWER)
    return max(2, math.ceil((z * deviation / difference) ** 2))


def _mean(values: Mapping[int, float]) -> str:
    return f"{100 * fmean(values.values()):.1f}" if values else ""
