"""`softpref compare`: compare files of responses with a baseline and with each other."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain, combinations, count
from pathlib import Path
from typing import Any, cast

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.data.column_cache import REFERENCE_CACHE, ColumnCache
from softpref.errors import UsageError
from softpref.judging.ask import Judged, ask_judge, make_judge
from softpref.judging.benchmarks import BenchmarkKind, benchmark_file, write_for_benchmark
from softpref.judging.controls import Controls, run_controls
from softpref.judging.judge import account, account_text, judge_record
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions, check_judge, judge_from_file
from softpref.judging.people import load_people, rate_by_people
from softpref.judging.rates import Agreement, JudgedRate, agreement, judged_rate
from softpref.judging.report import Contest, draw_win_rates, rates_latex, rates_markdown
from softpref.judging.responses import benchmark_uids, join
from softpref.judging.shared import asking, follow, refuse_idle_ranks
from softpref.options import option, require
from softpref.places import directory_to_write
from softpref.plots import save_figure
from softpref.statistics.people_rate import PeopleRate
from softpref.training.output import write_text

logger = logging.getLogger(__name__)


@dataclass
class CompareOptions:
    """Files and options of `softpref compare`."""

    responses: list[str] | None = option(
        "Files of responses, each FILE or NAME=FILE; those of one name are runs of a method.",
        required=True,
        metavar="FILE",
    )
    baseline: str | None = option(
        "Baseline responses to the same prompts.", required=True, metavar="FILE"
    )
    output: str = option(
        "Output directory; the same command resumes there.", "", required=True, metavar="DIR"
    )
    head_to_head: bool = option("Also compare the methods with each other, run by run.", False)
    controls: bool = option(
        "Also test the judge on a constant answer, identical answers and prompt injection attacks, "
        "and report whether it is fit.",
        False,
        group="judge",
    )
    human: str | None = option(
        "People's verdicts on a random 50 to 500 of the compared pairs (prompt, response_1, "
        "response_2, gold: 1, 2 or tie): also report the win rate that people would give.",
        metavar="FILE",
    )
    export_to: BenchmarkKind | None = option(
        "Also write the compared responses as files of AlpacaEval or Arena-Hard v2.0."
    )
    second_judge: str | None = option(
        "YAML file with a second judge's options, to measure the agreement of both judges.",
        group="judge",
        metavar="FILE",
    )
    second_judge_key: str | None = option(
        "NAME=ADDRESS for --second_judge: the environment variable with the API key, and the "
        "address to send it to, equal to base_url in the file.",
        group="judge",
        metavar="NAME=ADDRESS",
    )
    reference_cache: str | None = option(REFERENCE_CACHE, metavar="DIR", group="other")


def run_compare(files: CompareOptions, options: JudgeOptions, ranks: Ranks = ALONE) -> None:
    """Ask the missing questions and write `compare.json`, `.md`, `.tex`, `.png` and `.svg`.

    Several processes share what a reward model or policy scores; the first asks and writes.

    Raises:
        UsageError: options or files are invalid, or a judge cannot be asked.
    """
    require(files)
    output = directory_to_write(files.output)
    check_judge(options)
    second = None
    if files.second_judge:
        second = judge_from_file(files.second_judge, "--second_judge", files.second_judge_key)
    chosen = [options, second] if second else [options]
    refuse_idle_ranks(chosen, ranks)
    runs = named_runs(files.responses or [])
    contests = _contests(runs, str(files.baseline), head_to_head=files.head_to_head)
    people = load_people(files.human) if files.human else None
    if people:
        people.announce(contests.values())
    if files.export_to and ranks.is_first:
        _export(files, runs, contests)
    cache = ColumnCache(files.reference_cache)
    judges = [make_judge(each, ranks, cache) for each in chosen]
    if not ranks.is_first:
        follow(judges, ranks)
        return
    agreements: dict[str, Agreement | None] = {}
    controls = None
    by_people: dict[Contest, PeopleRate | None] = {}
    with asking(judges, ranks) as (judge, *others), VerdictLog(output / "verdicts.jsonl") as log:
        judged = {
            contest: ask_judge(comparisons, judge, options, log, contest.name)
            for contest, comparisons in contests.items()
        }
        if people:
            by_people = {
                contest: rate_by_people(comparisons, judged[contest].outcomes, people)
                for contest, comparisons in contests.items()
            }
        if files.controls:
            every = next(iter(contests.values()))
            controls = run_controls(every, judge, options, log)
        rates = {
            contest: judged_rate(found.outcomes, found.first_share)
            for contest, found in judged.items()
        }
        record = judge_record(judge, options)
        if second:  # write the first results, which are paid for, before it can fail
            _write(output, record, judged, rates, by_people, controls, agreements)
            for contest, comparisons in contests.items():
                what = f"second judge, {contest.name}"
                verdicts = ask_judge(comparisons, others[0], second, log, what)
                agreements[contest.name] = agreement(judged[contest].outcomes, verdicts.outcomes)
        _write(output, record, judged, rates, by_people, controls, agreements)


def named_runs(responses: list[str]) -> dict[str, list[str]]:
    """Return the files by name, in the given order.

    Raises:
        UsageError: a file is given twice, or two unnamed files have the same stem.
    """
    runs: dict[str, list[str]] = {}
    for given in responses:
        name, equals, path = given.partition("=")
        named = bool(equals) and not os.path.exists(given)  # a file name may contain "="
        if not named:
            name, path = Path(given).stem, given
        if path in runs.setdefault(name, []):
            raise UsageError(f"--responses {given}: is given twice.")
        if runs[name] and not named:
            raise UsageError(
                f"--responses {given}: the name {name} is taken; give NAME=FILE, the same name "
                "for runs of one method."
            )
        runs[name].append(path)
    return runs


def _contests(
    runs: Mapping[str, list[str]], baseline: str, *, head_to_head: bool
) -> dict[Contest, Any]:
    """Return the comparisons of every contest."""
    found = {
        Contest(name, None, i): join(path, baseline)
        for name, paths in runs.items()
        for i, path in enumerate(paths)
    }
    if head_to_head:
        for one, other in combinations(runs, 2):
            if len(runs[one]) != len(runs[other]):
                raise UsageError(
                    f"--head_to_head: {one} has {len(runs[one])} runs and {other} "
                    f"{len(runs[other])}; give the same number of each."
                )
            for i, (ours, theirs) in enumerate(zip(runs[one], runs[other], strict=True)):
                found[Contest(one, other, i)] = join(ours, theirs)
    return found


def _export(
    files: CompareOptions, runs: Mapping[str, list[str]], contests: Mapping[Contest, Any]
) -> None:
    """Write the responses of every contest with the baseline, and log where they are.

    Raises:
        UsageError: two methods would be written to one file.
    """
    kind, baseline = cast(BenchmarkKind, files.export_to), str(files.baseline)
    directory = Path(files.output) / kind
    methods = {contest: found for contest, found in contests.items() if not contest.rival}
    named: dict[str, Contest] = {}
    for contest in methods:
        other = named.setdefault(benchmark_file(kind, contest.name), contest)
        if other != contest:
            raise UsageError(
                f"--export_to {kind}: {other.name} and {contest.name} would both be written to "
                f"{benchmark_file(kind, other.name)}; rename one of them in --responses, NAME=FILE."
            )
    names = chain((Path(baseline).stem, "baseline"), map("baseline_{}".format, count(2)))
    against = next(name for name in names if benchmark_file(kind, name) not in named)
    theirs = benchmark_uids(baseline)
    for contest, comparisons in methods.items():
        uids = theirs | benchmark_uids(runs[contest.method][contest.run])
        write_for_benchmark(kind, directory, (contest.name, against), comparisons, uids)
    logger.info(
        "--export_to %s: %s files in %s, the baseline's is %s",
        kind,
        len(methods) + 1,
        directory,
        benchmark_file(kind, against),
    )


def _write(
    output: Path,
    judge: Mapping[str, Any],
    judged: Mapping[Contest, Judged],
    rates: Mapping[Contest, JudgedRate],
    by_people: Mapping[Contest, PeopleRate | None],
    controls: Controls | None,
    agreements: Mapping[str, Agreement | None],
) -> None:
    record = {
        **judge,
        "contests": [
            asdict(contest)
            | {"account": account(judged[contest]), "found": asdict(rate)}
            | ({"people": asdict(found)} if (found := by_people.get(contest)) else {})
            for contest, rate in rates.items()
        ],
        "controls": asdict(controls) if controls else None,
        "agreement": {name: found and asdict(found) for name, found in agreements.items()},
    }
    write_text(output / "compare.json", json.dumps(record, indent=1) + "\n")
    text = rates_markdown(rates, by_people, controls, agreements)
    write_text(output / "compare.md", text)
    write_text(output / "compare.tex", rates_latex(rates))
    figure = draw_win_rates(rates)
    for kind in ("png", "svg"):
        save_figure(figure, output / f"compare.{kind}")
    accounts = "\n".join(f"{c.name}: {account_text(found)}" for c, found in judged.items())
    logger.info("%s\n%s\nwritten: %s", text, accounts, output / "compare.md")
