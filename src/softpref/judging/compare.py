"""`softpref compare`: several files of responses against a baseline and against each other."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from softpref.errors import UsageError
from softpref.judging.ask import Judged, make_judge, put
from softpref.judging.controls import Controls, run_controls
from softpref.judging.judge import account, account_words, who_judged
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions, check_judge
from softpref.judging.questions import Judge
from softpref.judging.rates import Agreement, agreement, judged_rate
from softpref.judging.report import Contest, draw, latex, markdown
from softpref.judging.responses import join
from softpref.options import option, require
from softpref.training.output import write_text

logger = logging.getLogger(__name__)


@dataclass
class CompareOptions:
    """What `softpref compare` reads, adds and writes."""

    responses: list[str] | None = option(
        "Files of responses, each FILE or NAME=FILE; files of one name are runs of one method."
    )
    baseline: str | None = option("Responses to the same prompts that they are compared with.")
    output: str = option("Directory; the same command goes on there.", "")
    head_to_head: bool = option("Compare the methods with each other as well, run by run.", False)
    controls: bool = option(
        "Also have the judge compare a constant answer, identical answers and attacks that give it "
        "orders, and say whether it is fit.",
        False,
    )
    second_judge: str | None = option(
        "YAML file with a second judge's options, to measure how far the two agree."
    )


def run_compare(files: CompareOptions, options: JudgeOptions) -> None:
    """Ask what is missing and write `compare.json`, `.md`, `.tex`, `.png` and `.svg`.

    Raises:
        UsageError: options or files are wrong, or a judge cannot be asked.
    """
    for name in ("responses", "baseline", "output"):
        require(getattr(files, name), f"--{name}")
    check_judge(options)
    second = judge_from_file(files.second_judge, "--second_judge") if files.second_judge else None
    runs = named_runs(files.responses or [])
    contests = _contests(runs, str(files.baseline), head_to_head=files.head_to_head)
    output, judge = Path(files.output), make_judge(options)
    agreements: dict[str, Agreement | None] = {}
    controls = None
    with VerdictLog(output / "verdicts.jsonl") as log:
        judged = {
            contest: put(comparisons, judge, options, log, contest.words)
            for contest, comparisons in contests.items()
        }
        if files.controls:
            every = next(iter(contests.values()))
            controls = run_controls(every, judge, options, log)
        if second:
            other = make_judge(second)
            for contest, comparisons in contests.items():
                verdicts = put(comparisons, other, second, log, f"second judge, {contest.words}")
                agreements[contest.words] = agreement(judged[contest].outcomes, verdicts.outcomes)
    _write(output, judge, options, judged, controls, agreements)


def named_runs(responses: list[str]) -> dict[str, list[str]]:
    """Return the files of every name, in the order given.

    Raises:
        UsageError: a file is given twice.
    """
    runs: dict[str, list[str]] = {}
    for given in responses:
        name, equals, path = given.partition("=")
        if not equals:
            name, path = Path(given).stem, given
        if path in runs.setdefault(name, []):
            raise UsageError(f"--responses {given}: is given twice.")
        runs[name].append(path)
    return runs


def judge_from_file(path: str, flag: str) -> JudgeOptions:
    """Return a judge's options from a YAML file.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"{flag} {path}: cannot be read ({first}).") from None
    known = {field.name: field for field in fields(JudgeOptions)}
    if not isinstance(given, dict):
        raise UsageError(f"{flag} {path}: write `key: value` lines, such as judge_model: gpt-4o.")
    for key in given:
        if key not in known:
            raise UsageError(f"{flag} {path}: unknown key {key!r}; known: {', '.join(known)}.")
    try:
        options = JudgeOptions(**given)
        check_judge(options)
    except UsageError as error:
        raise UsageError(f"{flag} {path}: {error}") from None
    except TypeError:
        raise UsageError(f"{flag} {path}: a value is of the wrong kind.") from None
    return options


def _contests(
    runs: Mapping[str, list[str]], baseline: str, *, head_to_head: bool
) -> dict[Contest, Any]:
    """Return every comparison that is asked for, by who is in it."""
    found = {
        Contest(name, None, i): join(path, baseline)
        for name, paths in runs.items()
        for i, path in enumerate(paths)
    }
    if head_to_head:
        for one, other in combinations(runs, 2):
            for i, (ours, theirs) in enumerate(zip(runs[one], runs[other], strict=False)):
                found[Contest(one, other, i)] = join(ours, theirs)
    return found


def _write(
    output: Path,
    judge: Judge,
    options: JudgeOptions,
    judged: Mapping[Contest, Judged],
    controls: Controls | None,
    agreements: Mapping[str, Agreement | None],
) -> None:
    rates = {
        contest: judged_rate(found.outcomes, found.first_share) for contest, found in judged.items()
    }
    record = who_judged(judge, options) | {
        "contests": [
            asdict(contest) | {"account": account(judged[contest]), "found": asdict(rate)}
            for contest, rate in rates.items()
        ],
        "controls": asdict(controls) if controls else None,
        "agreement": {words: found and asdict(found) for words, found in agreements.items()},
    }
    write_text(output / "compare.json", json.dumps(record, indent=1) + "\n")
    text = markdown(rates, controls, agreements)
    write_text(output / "compare.md", text)
    write_text(output / "compare.tex", latex(rates))
    figure = draw(rates)
    for kind in ("png", "svg"):
        figure.savefig(output / f"compare.{kind}", dpi=130)
    accounts = "\n".join(f"{c.words}: {account_words(found)}" for c, found in judged.items())
    logger.info("%s\n%s\nwritten: %s", text, accounts, output / "compare.md")
