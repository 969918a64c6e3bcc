"""Ask a judge about comparisons, without repeating a call or losing an answer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.data.column_cache import ColumnCache
from softpref.errors import UsageError
from softpref.judging.endpoint import GROWTH, Endpoint
from softpref.judging.failures import CUT_OFF, CUT_ONCE, GIVEN_UP, NOT_MADE, OPEN, Streak, stopped
from softpref.judging.forecast import spread
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeKind, JudgeOptions
from softpref.judging.outcomes import Outcome, mean_verdict, outcomes_of
from softpref.judging.preview import Preview
from softpref.judging.questions import Answer, Comparison, Judge, Question, judge_hash, questions_of
from softpref.judging.scored import ImplicitReward, RewardModel, RightAnswers
from softpref.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """The outcomes of comparisons, with their calls and costs.

    Attributes:
        outcomes: one per comparison.
        mean_verdicts: one per comparison, from `mean_verdict`.
        first_share: share of verdicts for A, without ties; None if there are none.
        calls: number of distinct questions behind the outcomes.
        failures: number of failed calls, by kind.
        input_tokens: of these calls, including those of earlier runs and repeated ones.
        output_tokens: likewise.
        dollars: their cost; None without prices, without a count of tokens, or for a local judge.
    """

    outcomes: list[Outcome]
    mean_verdicts: list[float]
    first_share: float | None
    calls: int
    failures: Mapping[str, int]
    input_tokens: int
    output_tokens: int
    dollars: float | None


JUDGES: Mapping[JudgeKind, Callable[[JudgeOptions, Ranks, ColumnCache], Judge]] = {
    "endpoint": lambda options, *_: Endpoint(options),
    "reward_model": lambda options, ranks, cache: RewardModel(
        str(options.judge_model),
        options.judge_batch_size,
        cache,
        ranks=ranks,
        bits=options.bits(),
        dtype=torch.bfloat16 if options.judge_bf16 else None,
    ),
    "implicit_reward": lambda options, ranks, _: ImplicitReward(options, ranks),
    "checker": lambda *_: RightAnswers(),
}


def make_judge(
    options: JudgeOptions, ranks: Ranks = ALONE, cache: ColumnCache | None = None
) -> Judge:
    """Return the judge that the options select, with its model loaded.

    Args:
        options: checked options.
        ranks: who shares what it scores.
        cache: where a reward model keeps rewards; None for the user's.

    Raises:
        UsageError: it cannot be loaded or reached.
    """
    return JUDGES[options.judge](options, ranks, cache or ColumnCache(None))


def ask_judge(
    comparisons: Sequence[Comparison],
    judge: Judge,
    options: JudgeOptions,
    log: VerdictLog,
    what: str = "judging",
) -> Judged:
    """Ask the questions that the log has no answer to, and return the outcomes.

    Raises:
        UsageError: the endpoint rejects the calls, too many calls in a row fail the same way, or
            `max_cost` is reached; earlier answers are in the log.
    """
    name = judge_hash(judge)
    orders = options.orders if judge.sees_order else "one"
    questions = questions_of(comparisons, orders, options.order_seed)
    every = {question.key(name): question for group in questions.values() for question in group}
    missing = {
        key: replace(question, attempt=1) if key in log.cut else question
        for key, question in every.items()
        if _is_open(log.answers.get(key), options.retry_failed and key not in log.fresh)
    }
    asked = _ask_missing(missing, every, judge, options, log, what)
    answered = every.keys() & log.fresh
    if unmade := sum(log.answers[key].failure == NOT_MADE for key in answered):
        raise UsageError(
            f"{unmade} of {len(every)} calls were not made by their batch, which expired, was "
            "cancelled, or met a limit or fault of the server; they cost nothing; run the same "
            "command to submit them again, or without --batch."
        )
    left = len(missing) - asked
    if left:
        raise UsageError(
            f"--max_cost {options.max_cost} dollars: {left} of {len(every)} calls were not made, "
            "because the next one could have exceeded it; run the same command with a larger "
            "--max_cost to continue."
        )
    answers = {
        uid: [log.answers[question.key(name)] for question in group]
        for uid, group in questions.items()
    }
    outcomes = outcomes_of(comparisons, questions, answers)
    mean_verdicts = [mean_verdict(questions[each.uid], answers[each.uid]) for each in comparisons]
    return _account(outcomes, mean_verdicts, list(every), log, judge)


def _ask_missing(
    missing: dict[str, Question],
    every: Mapping[str, Question],
    judge: Judge,
    options: JudgeOptions,
    log: VerdictLog,
    what: str,
) -> int:
    """Ask questions, and log the answers; return how many were answered.

    Raises:
        UsageError: the endpoint rejects the calls, or too many in a row fail the same way.
    """
    name = judge_hash(judge)
    preview = None
    if judge.account:
        judge.account.resume(log, name)
        keys = list(missing)
        missing = {keys[i]: missing[keys[i]] for i in spread(len(keys))}
        preview = Preview(what, every, missing, judge.account, options, log)
    else:
        known = len(every) - len(missing)
        before = f", {known:,} answered before" if known else ""
        logger.info("%s: %s calls%s", what, f"{len(missing):,}", before)
    streak = Streak(len(missing), name in log.known)
    asked, stop, failure = 0, None, None
    with Progress(what, len(missing), "call") as bar:
        for question, answer in judge.ask(list(missing.values())):
            log.add(question, answer, name)
            if answer.failure in (CUT_ONCE, NOT_MADE):
                continue
            bar.update()
            asked += 1
            if preview:
                preview.answered(question.key(name))
            if stop:
                given_up = [question] if answer.failure == failure else []
            elif judge.account and not answer.in_batch and streak.add(question, answer.failure):
                given_up, failure = streak.items, answer.failure
                stop = UsageError(_stopped(str(failure), len(given_up), options))
                judge.account.is_stopped = True  # calls in flight are paid: count them, too
            else:
                continue
            for last in given_up:  # the next run asks them again
                log.add(last, Answer(None, GIVEN_UP), name)
    if stop:
        raise stop
    return asked


def _is_open(answer: Answer | None, retry_failed: bool) -> bool:
    """Return whether a question must still be asked."""
    return answer is None or answer.failure in OPEN or (retry_failed and bool(answer.failure))


def _stopped(failure: str, count: int, options: JudgeOptions) -> str:
    longest = options.max_reply_tokens * GROWTH
    form = "try --structured_output words, or another --judge_model"
    if options.structured_output == "words":
        form = "use a server that holds replies to a JSON schema, or another --judge_model"
    remedies = {
        CUT_OFF: f"replies do not fit into {longest:,} tokens: give a larger --max_reply_tokens, "
        "or --reasoning_effort low for a model that thinks first",
        "no verdict": form,
        "status 400": "give a smaller --max_reply_tokens if the model's context cannot hold it, "
        f"or {form}",
    }
    return stopped(failure, count, "--judge_model", remedies)


def _account(
    outcomes: list[Outcome],
    mean_verdicts: list[float],
    keys: Sequence[str],
    log: VerdictLog,
    judge: Judge,
) -> Judged:
    answers = [log.answers[key] for key in keys]
    tokens = log.counted(keys)
    verdicts = Counter((answer.verdict or "")[:1] for answer in answers)
    preferred = verdicts["A"] + verdicts["B"]
    dollars = judge.account.dollars(*log.paid(keys)) if judge.account else None
    uncounted = sum(bool(a.verdict) and not (a.input_tokens or a.output_tokens) for a in answers)
    if dollars is not None and uncounted:
        dollars = None
        logger.warning(
            "the endpoint counts no tokens in %d of %d answers, so the cost is not known",
            uncounted,
            len(answers),
        )
    return Judged(
        outcomes=outcomes,
        mean_verdicts=mean_verdicts,
        first_share=verdicts["A"] / preferred if preferred and judge.sees_order else None,
        calls=len(answers),
        failures=dict(Counter(answer.failure for answer in answers if answer.failure)),
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        dollars=dollars,
    )
