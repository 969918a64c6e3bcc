"""Win rates as tables and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from matplotlib.figure import Figure

from softpref.judging.controls import Controls
from softpref.judging.people import people_remarks
from softpref.judging.rates import Agreement, Interval, JudgedRate
from softpref.markup import for_latex, for_markdown, for_plot, pipes, shortened
from softpref.statistics.people_rate import PeopleRate

COLOUR = "#1f6f8b"


@dataclass(frozen=True)
class Contest:
    """A run of a method against a rival method's run, or against the baseline (None)."""

    method: str
    rival: str | None
    run: int

    @property
    def name(self) -> str:
        """Name of the contest."""
        against = f" against {self.rival}" if self.rival else ""
        return f"{self.method}{against}" + (f", run {self.run + 1}" if self.run else "")


Rates = Mapping[Contest, JudgedRate]
_Row = tuple[str, list[JudgedRate]]


def rates_markdown(
    rates: Rates,
    people: Mapping[Contest, PeopleRate | None],
    controls: Controls | None,
    agreements: Mapping[str, Agreement | None],
) -> str:
    """Return the report in Markdown."""
    parts = ["# Win rates\n"]
    for title, rows in _tables(rates):
        parts += [f"## {title}\n", _table(rows)]
    parts.append(
        "Ties and failures are excluded from the win rate; verdicts that changed with the order "
        "are ties. Intervals are 95%: Wilson's, which takes comparisons for independent, and by "
        "resampling prompts. Style is length, headers, lists and bold text. The bounds count all "
        "failures as losses, and as wins. Several runs: mean ± deviation, and ends of intervals "
        "and bounds as means over runs.\n"
    )
    if any(rate.strong_wins or rate.strong_losses for rate in rates.values()):
        parts += [
            "Strong verdicts, which weigh no more than others in the rates:\n",
            _strong(rates),
        ]
    if people:
        parts += ["## Win rates that people would give\n", _people_section(rates, people)]
    if agreements:
        parts += ["## Agreement with the second judge\n", _agreement_table(agreements)]
    if controls:
        parts += ["## Is the judge fit?\n", _fitness(controls)]
    return "\n".join(parts)


def _tables(rates: Rates) -> list[tuple[str, list[_Row]]]:
    tables: dict[str, dict[str, list[JudgedRate]]] = {}
    for contest, rate in rates.items():
        title = "Head to head" if contest.rival else "Against the baseline"
        name = f"{contest.method} against {contest.rival}" if contest.rival else contest.method
        tables.setdefault(title, {}).setdefault(name, []).append(rate)
    return [(title, list(rows.items())) for title, rows in tables.items()]


_COLUMNS = (
    "win rate, %", "Wilson", "by prompts", "bounds", "at equal length, %", "by prompts",
    "at equal style, %", "by prompts", "longer by, characters", "ties, %",
    "changed with the order, %", "shown first, %", "failed, %", "asked",
)  # fmt: skip


def _table(rows: Sequence[_Row]) -> str:
    return pipes([("", *_COLUMNS), *((shortened(name), *_cells(runs)) for name, runs in rows)])


def _cells(runs: Sequence[JudgedRate]) -> list[str]:
    def share(name: str) -> str:
        return f"{100 * fmean(getattr(run, name) / run.asked for run in runs):.1f}"

    return [
        mean_and_deviation([run.rate for run in runs]),
        _mean_interval([run.interval for run in runs]),
        _mean_interval([run.clustered_interval for run in runs]),
        _mean_interval([run.bounds for run in runs]),
        mean_and_deviation([run.length_controlled for run in runs]),
        _mean_interval([run.length_controlled_interval for run in runs]),
        mean_and_deviation([run.style_controlled for run in runs]),
        _mean_interval([run.style_controlled_interval for run in runs]),
        f"{round(fmean(run.length_difference for run in runs)):+d}",
        share("ties"),
        share("flipped"),
        mean_and_deviation([run.first_share for run in runs]),
        share("failed"),
        f"{sum(run.asked for run in runs)}",
    ]


def mean_and_deviation(shares: Sequence[float | None]) -> str:
    """Return shares in percent: "61.2", "61.2 ± 1.3" for several, or a dash for none."""
    found = [100 * share for share in shares if share is not None]
    if not found:
        return "–"
    return f"{fmean(found):.1f}" + (f" ± {stdev(found):.1f}" if len(found) > 1 else "")


def _mean_interval(intervals: Sequence[Interval]) -> str:
    low, high = (100 * fmean(ends) for ends in zip(*intervals, strict=True))
    return f"{low:.1f} to {high:.1f}"


def _strong(rates: Rates) -> str:
    rows = [["", "wins", "of them strong", "losses", "of them strong"]]
    for contest, rate in rates.items():
        counts = (rate.wins, rate.strong_wins, rate.losses, rate.strong_losses)
        rows.append([shortened(contest.name), *(f"{count:,}" for count in counts)])
    return pipes(rows)


def _people_section(rates: Rates, people: Mapping[Contest, PeopleRate | None]) -> str:
    ends = ("judge", "people", "people alone")
    header = [title for name in ends for title in (f"{name}, %", "by prompts")]
    rows = [["", *header, "people's verdicts", "their ties, %", "worth"]]
    remarks = []
    for contest, found in people.items():
        rate = rates[contest]
        cells = [shortened(contest.name), *_with_interval(rate.rate, rate.clustered_interval)]
        if found:
            cells += _with_interval(found.rate, found.interval)
            cells += _with_interval(found.alone, found.alone_interval)
            ties = f"{100 * found.ties / found.verdicts:.1f}"
            cells += [f"{found.verdicts:,}", ties, f"{found.worth:,.0f}"]
            name = for_markdown(shortened(contest.name))
            remarks += [f"- {name}: {each}." for each in people_remarks(found, rate.asked)]
        else:
            cells += ["–"] * 4 + ["0", "–", "–"]
        rows.append(cells)
    explained = (
        "People's rate is the judge's, corrected by people's verdicts on a sample; their ties are "
        "excluded. Worth: how many verdicts of people alone would give an interval as short.\n"
    )
    return "\n".join([pipes(rows), explained, *remarks, ""])


def _with_interval(rate: float | None, interval: Interval) -> list[str]:
    return [mean_and_deviation([rate]), _mean_interval([interval])]


def _agreement_table(agreements: Mapping[str, Agreement | None]) -> str:
    rows = [("", "Cohen's κ", "by prompts", "judged by both")]
    for name, found in agreements.items():
        kappa, interval, count = "–", "–", 0
        if found:
            kappa = "–" if found.kappa is None else f"{found.kappa:.2f}"
            interval, count = "{:.2f} to {:.2f}".format(*found.interval), found.comparisons
        rows.append((shortened(name), kappa, interval, str(count)))
    return pipes(rows)


def _fitness(controls: Controls) -> str:
    verdict = "Nothing speaks against it."
    if controls.unfit:
        verdict = f"**Unfit**: {'; '.join(controls.unfit)}."
    rows: list[_Row] = [
        ("a constant answer", [controls.null]),
        ("the baseline's answer against itself", [controls.identical]),
    ]
    if controls.attacks:
        rows.append(("attacks against honest answers", [controls.attacks]))
    return f"{verdict}\n\n{_table(rows)}"


def rates_latex(rates: Rates) -> str:
    """Return the win rates as the rows of a tabular."""
    header = r"& win rate (\%) & Wilson's 95\% & all failures lost to all won & failed (\%) "
    header += r"& at equal length (\%) \\"
    lines = [r"\begin{tabular}{lrrrrr}", r"\toprule", header, r"\midrule"]
    for _, rows in _tables(rates):
        for name, runs in rows:
            rate = mean_and_deviation([run.rate for run in runs])
            controlled = mean_and_deviation([run.length_controlled for run in runs])
            failed = f"{100 * fmean(run.failed / run.asked for run in runs):.1f}"
            interval = _mean_interval([run.interval for run in runs])
            bounds = _mean_interval([run.bounds for run in runs])
            cells = [shortened(name), rate, interval, bounds, failed, controlled]
            lines.append(" & ".join(map(for_latex, cells)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def draw_win_rates(rates: Rates) -> Figure:
    """Draw each contest's win rate with its interval by prompts (thick) and its bounds (thin)."""
    figure = Figure(figsize=(7, 1.2 + 0.42 * len(rates)), layout="constrained")
    axes = figure.subplots()
    for place, rate in enumerate(rates.values()):
        thin, thick = (
            [100 * end for end in ends] for ends in (rate.bounds, rate.clustered_interval)
        )
        axes.plot(thin, [place, place], color=COLOUR, alpha=0.35)
        axes.plot(thick, [place, place], color=COLOUR, lw=4, solid_capstyle="butt")
        if rate.rate is not None:
            axes.plot(100 * rate.rate, place, "o", color="white", mec=COLOUR, mew=2)
    axes.axvline(50, color="grey", lw=1, ls=":")
    axes.set_yticks(range(len(rates)), [for_plot(contest.name) for contest in rates])
    axes.set_ylim(len(rates) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel(
        "win rate, %: thick, 95% interval by prompts; thin, all failures lost to all won"
    )
    return figure
