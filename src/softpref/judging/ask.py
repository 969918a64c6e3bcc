"""Ask a judge about comparisons, without repeating a call or losing an answer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softpref.errors import UsageError
from softpref.judging.endpoint import Endpoint
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions
from softpref.judging.outcomes import Outcome, mean_verdict, outcomes_of
from softpref.judging.questions import Answer, Comparison, Judge, Question, judge_hash, questions_of
from softpref.judging.scored import ImplicitReward, RewardModel, RightAnswers
from softpref.progress import Progress

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 20  # failures of one kind in a row
GIVEN_UP = "given up"


@dataclass(frozen=True)
class Judged:
    """The outcomes of comparisons, with their calls and costs.

    Attributes:
        outcomes: one per comparison.
        mean_verdicts: one per comparison, from `mean_verdict`.
        first_share: share of verdicts for A, without ties; None if there are none.
        calls: number of distinct questions behind the outcomes.
        failures: number of failed calls, by kind.
        input_tokens: of these calls, including those of earlier runs.
        output_tokens: likewise.
        dollars: their cost; None without prices or for a local judge.
    """

    outcomes: list[Outcome]
    mean_verdicts: list[float]
    first_share: float | None
    calls: int
    failures: Mapping[str, int]
    input_tokens: int
    output_tokens: int
    dollars: float | None


def make_judge(options: JudgeOptions) -> Judge:
    """Return the judge that the options select, with its model loaded.

    Raises:
        UsageError: it cannot be loaded or reached.
    """
    if options.judge == "endpoint":
        return Endpoint(options)
    if options.judge == "reward_model":
        return RewardModel(str(options.judge_model), options.judge_batch_size)
    if options.judge == "implicit_reward":
        return ImplicitReward(options)
    return RightAnswers()


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
        key: question
        for key, question in every.items()
        if _is_open(log.answers.get(key), options.retry_failed and key not in log.fresh)
    }
    _announce(judge, list(missing.values()), len(every), what)
    is_known = name in log.known
    if isinstance(judge, Endpoint):
        judge.spent = judge.dollars(*log.billed(name)) or 0.0
        judge.has_answered = is_known
    streak: list[Question] = []
    asked = 0
    with Progress(what, len(missing), "call") as bar:
        for question, answer in judge.ask(list(missing.values())):
            log.add(question, answer, name)
            bar.update()
            asked += 1
            same = streak and log.answers[streak[-1].key(name)].failure == answer.failure
            streak = [*streak, question] if same else [question]
            if _is_hopeless(answer, len(streak), asked, len(missing), is_known):
                _give_up(streak, answer, log, name)
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
    return _account(outcomes, mean_verdicts, [log.answers[key] for key in every], judge)


def _announce(judge: Judge, missing: Sequence[Question], every: int, what: str) -> None:
    known = every - len(missing)
    text = f"{what}: {len(missing):,} calls" + (f", {known:,} answered before" if known else "")
    if isinstance(judge, Endpoint) and missing:
        inputs, replies = judge.estimate(missing)
        text += f"; about {inputs:,} input tokens and at most {replies:,} of replies"
        dollars = judge.dollars(inputs, replies)
        if dollars is not None:
            text += f", at most about {dollars:.2f} dollars"
    logger.info("%s", text)


def _is_open(answer: Answer | None, retry_failed: bool) -> bool:
    """Return whether a question must still be asked."""
    return answer is None or answer.failure == GIVEN_UP or (retry_failed and bool(answer.failure))


def _is_hopeless(answer: Answer, streak: int, asked: int, calls: int, is_known: bool) -> bool:
    """Return whether the endpoint, not the questions, must be the cause of the failures.

    Args:
        answer: the last answer.
        streak: number of consecutive answers with its failure.
        asked: number of calls so far.
        calls: number of calls in total.
        is_known: whether the endpoint has ever given a verdict.
    """
    if answer.failure is None:
        return False
    is_unreachable = answer.failure == "no connection" or answer.failure.startswith("status")
    if streak == asked == calls:
        return is_unreachable
    return streak == GIVE_UP_AFTER and (is_unreachable or (streak == asked and not is_known))


def _give_up(streak: Sequence[Question], answer: Answer, log: VerdictLog, name: str) -> None:
    """Stop; mark the last failures so that the next run asks them again."""
    for question in streak:
        log.add(question, Answer(None, GIVEN_UP), name)
    raise UsageError(
        f"{len(streak)} calls in a row failed ({answer.failure}): check quota, --base_url and "
        "--judge_model, and try --structured_output words; run the same command to ask them "
        "again and continue."
    )


def _account(
    outcomes: list[Outcome], mean_verdicts: list[float], answers: Sequence[Answer], judge: Judge
) -> Judged:
    verdicts = Counter((answer.verdict or "")[:1] for answer in answers)
    preferred = verdicts["A"] + verdicts["B"]
    tokens = [
        sum(getattr(answer, name) for answer in answers)
        for name in ("input_tokens", "output_tokens")
    ]
    return Judged(
        outcomes=outcomes,
        mean_verdicts=mean_verdicts,
        first_share=verdicts["A"] / preferred if preferred and judge.sees_order else None,
        calls=len(answers),
        failures=dict(Counter(answer.failure for answer in answers if answer.failure)),
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        dollars=judge.dollars(*tokens) if isinstance(judge, Endpoint) else None,
    )
