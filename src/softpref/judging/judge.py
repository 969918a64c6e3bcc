"""`softpref judge`: judge two files of responses, or measure a judge on labelled pairs."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.data.column_cache import REFERENCE_CACHE, ColumnCache
from softpref.errors import UsageError
from softpref.judging.ask import Judged, ask_judge, make_judge
from softpref.judging.check import JudgeQuality, judge_quality, load_gold
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions, check_judge
from softpref.judging.questions import Judge
from softpref.judging.rates import JudgedRate, judged_rate
from softpref.judging.responses import join
from softpref.judging.shared import asking, follow, refuse_idle_ranks
from softpref.judging.template import USER, system_prompt
from softpref.options import option, require
from softpref.places import directory_to_write
from softpref.training.output import write_lines, write_text

logger = logging.getLogger(__name__)

_UNFIT = "**unfit**: on these pairs the judge is not shown to be better than chance"


@dataclass
class JudgeFiles:
    """Files of `softpref judge`."""

    responses: str | None = option(
        "Responses to judge: rows of prompt, response.",
        required=True,
        unless="check",
        group="data",
        metavar="FILE",
    )
    baseline: str | None = option(
        "Baseline responses to the same prompts.",
        required=True,
        unless="check",
        group="data",
        metavar="FILE",
    )
    check: str | None = option(
        "Measure the judge instead, on pairs whose better response is known (prompt, response_1, "
        "response_2, gold).",
        group="data",
        metavar="FILE",
    )
    output: str = option(
        "Output directory; the same command resumes there, and asks nothing twice.",
        "",
        required=True,
        metavar="DIR",
    )
    reference_cache: str | None = option(REFERENCE_CACHE, metavar="DIR", group="other")


def run_judge(files: JudgeFiles, options: JudgeOptions, ranks: Ranks = ALONE) -> None:
    """Ask the judge, and write `verdicts.jsonl`, `outcomes.jsonl` and `judge.json`.

    Several processes share what a reward model or policy scores; the first asks and writes.

    Raises:
        UsageError: options or files are invalid, or the judge cannot be asked.
    """
    require(files)
    output = directory_to_write(files.output)
    check_judge(options)
    refuse_idle_ranks([options], ranks)
    if files.check:
        if files.responses or files.baseline:
            raise UsageError("--check measures the judge: remove --responses and --baseline.")
        comparisons = load_gold(files.check)
    else:
        comparisons = join(str(files.responses), str(files.baseline))
    judge = make_judge(options, ranks, ColumnCache(files.reference_cache))
    if not ranks.is_first:
        follow([judge], ranks)
        return
    with asking([judge], ranks) as (judge,), VerdictLog(output / "verdicts.jsonl") as log:
        judged = ask_judge(comparisons, judge, options, log)
        write_lines(output / "outcomes.jsonl", map(asdict, judged.outcomes))
        found = (
            judge_quality(judged)
            if files.check
            else judged_rate(judged.outcomes, judged.first_share)
        )
        record = judge_record(judge, options) | {"account": account(judged), "found": asdict(found)}
        write_text(output / "judge.json", json.dumps(record, indent=1) + "\n")
    about = files.check or f"{files.responses} against {files.baseline}"
    text = quality_text(found) if isinstance(found, JudgeQuality) else win_rate_text(found)
    logger.info(f"{about}\n{text}\n{account_text(judged)}\nwritten: {output / 'judge.json'}")


def judge_record(judge: Judge, options: JudgeOptions) -> dict[str, Any]:
    """Return the judge's identity, its orders, and its template, for the record."""
    orders: dict[str, Any] = {"orders": "none, each response is scored for itself"}
    if judge.sees_order:
        orders = {"orders": options.orders}
        if options.orders == "one":
            orders["order_seed"] = options.order_seed
        orders["template"] = {"system": system_prompt(options.grades), "user": USER}
    return {"judge": dict(judge.identity), **orders}


def account(judged: Judged) -> dict[str, Any]:
    """Return the calls, failures, tokens and dollars behind the outcomes."""
    names = ("calls", "failures", "input_tokens", "output_tokens", "dollars")
    return {name: getattr(judged, name) for name in names}


def account_text(judged: Judged) -> str:
    """Return a summary of calls, failures and costs."""
    failed = sum(judged.failures.values())
    text = f"{judged.calls:,} calls, {failed:,} failed ({failed / judged.calls:.1%})"
    if judged.failures:
        kinds = (f"{kind} {count:,}" for kind, count in sorted(judged.failures.items()))
        text += f": {', '.join(kinds)}"
    if judged.input_tokens:
        text += f"; {judged.input_tokens:,} tokens sent, {judged.output_tokens:,} received"
    if judged.dollars is not None:
        text += f", {judged.dollars:.2f} dollars"
    return text


def win_rate_text(rate: JudgedRate) -> str:
    """Return a summary of a win rate, with its intervals and counts."""
    counted = (
        f"{rate.wins:,} wins, {rate.losses:,} losses, {rate.ties:,} ties "
        f"({rate.flipped:,} of them verdicts that changed with the order), {rate.failed:,} failed "
        f"({rate.failed / rate.asked:.1%} of {rate.asked:,} pairs)"
    )
    if rate.rate is None:
        return f"no win rate, because nothing was decided: {counted}"
    bounds = ""
    if rate.failed:
        low, high = rate.bounds
        bounds = f"; {low:.1%} if all failures were losses, {high:.1%} if all were wins"
    low, high = rate.clustered_interval
    equal = "no rate at equal length, because one side is always longer"
    if rate.length_controlled is not None:
        equal = f"{rate.length_controlled:.1%} at equal length"
    if rate.style_controlled is not None:
        equal += f", {rate.style_controlled:.1%} at equal length, headers, lists and bold text"
    return (
        f"win rate {rate.rate:.1%} (95%: {rate.interval[0]:.1%} to {rate.interval[1]:.1%}; by "
        f"prompts {low:.1%} to {high:.1%}){bounds}\n{counted}\n"
        f"{equal}; responses are "
        f"{abs(rate.length_difference):,.0f} characters "
        f"{'longer' if rate.length_difference >= 0 else 'shorter'} than the baseline's"
    )


def quality_text(quality: JudgeQuality) -> str:
    """Return a summary of a judge's quality."""
    accuracy = "decided nothing"
    if quality.accuracy is not None:
        low, high = quality.accuracy_interval
        accuracy = f"right in {quality.accuracy:.1%} of what it decided ({low:.1%} to {high:.1%})"
    place = ""
    if quality.first_share is not None:
        place = f"; preferred the response shown first in {quality.first_share:.1%} of verdicts"
    return (
        f"{quality.pairs:,} pairs: {accuracy}, in {quality.right:.1%} of all; "
        f"{quality.ties:.1%} ties, {quality.flipped:.1%} of all changed with the order{place}; "
        f"{quality.failed:.1%} failed"
        + ("" if quality.accuracy_interval[0] > 0.5 else f"\n{_UNFIT}")
    )
