"""Putting comparisons to a judge: nothing twice, nothing lost, everything accounted for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from softpref.errors import UsageError
from softpref.judging.endpoint import Endpoint
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions
from softpref.judging.outcomes import Outcome, outcomes_of
from softpref.judging.questions import Answer, Comparison, Judge, Question, judge_hash, questions_of
from softpref.judging.scored import ImplicitReward, RewardModel, RightAnswers

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 20  # calls of which every one met the same error of the endpoint


@dataclass(frozen=True)
class Judged:
    """Comparisons with what became of them.

    Attributes:
        outcomes: one a comparison.
        first_share: how often, of all verdicts but ties, A was preferred; None without any.
        calls: distinct questions that these outcomes rest on.
        failures: how many of the calls failed, by kind.
        input_tokens: of these calls, whenever they were made; `output_tokens` likewise.
        output_tokens: see `input_tokens`.
        dollars: what they cost; None where no prices were given or nothing is paid.
    """

    outcomes: list[Outcome]
    first_share: float | None
    calls: int
    failures: Mapping[str, int]
    input_tokens: int
    output_tokens: int
    dollars: float | None


def make_judge(options: JudgeOptions) -> Judge:
    """Return the judge that the options name; loading a model takes a while.

    Raises:
        UsageError: it cannot be had.
    """
    if options.judge == "endpoint":
        return Endpoint(options)
    if options.judge == "reward_model":
        return RewardModel(options)
    if options.judge == "implicit_reward":
        return ImplicitReward(options)
    return RightAnswers()


def put(
    comparisons: Sequence[Comparison],
    judge: Judge,
    options: JudgeOptions,
    log: VerdictLog,
    what: str = "judging",
) -> Judged:
    """Ask whatever the log has no answer to yet, and return what became of the comparisons.

    Raises:
        UsageError: the endpoint refuses us, every first call fails with one status, or `max_cost`
            ended the asking; what was answered by then is in the log.
    """
    name = judge_hash(judge)
    orders = options.orders if judge.sees_order else "one"
    questions = questions_of(comparisons, orders, options.order_seed)
    every = {question.key(name): question for of_one in questions.values() for question in of_one}
    missing = {
        key: question for key, question in every.items()
        if key not in log.answers or (options.retry_failed and log.answers[key].failure)
    }  # fmt: skip
    _announce(judge, list(missing.values()), len(every), what)
    if isinstance(judge, Endpoint):
        judge.spent = judge.dollars(*log.tokens(name)) or 0.0
    kinds: Counter[str | None] = Counter()
    bar = tqdm(total=len(missing), desc=what, unit="call", disable=None, delay=1)
    with bar:
        for question, answer in judge.ask(list(missing.values())):
            log.add(question, answer, name)
            bar.update()
            kinds[answer.failure] += 1
            _give_up_if_hopeless(kinds)
    left = sum(key not in log.answers for key in every)
    if left:
        raise UsageError(
            f"--max_cost {options.max_cost} dollars: {left} of {len(every)} calls were not made, "
            "for the next one could have gone above it; the same command with a larger --max_cost "
            "goes on from here."
        )
    answers = {
        uid: [log.answers[question.key(name)] for question in of_one]
        for uid, of_one in questions.items()
    }
    outcomes = outcomes_of(comparisons, questions, answers)
    return _account(outcomes, [log.answers[key] for key in every], judge)


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


def _give_up_if_hopeless(kinds: Counter[str | None]) -> None:
    kind = next(iter(kinds))
    hopeless = kind is not None and (kind.startswith("status") or kind == "no connection")
    if hopeless and len(kinds) == 1 and kinds[kind] == GIVE_UP_AFTER:
        raise UsageError(
            f"the first {GIVE_UP_AFTER} calls all failed ({kind}): check --base_url and "
            "--judge_model, and try --structured_output off; then --retry_failed true asks again."
        )


def _account(outcomes: list[Outcome], answers: Sequence[Answer], judge: Judge) -> Judged:
    verdicts = Counter(answer.verdict for answer in answers)
    preferred = verdicts["A"] + verdicts["B"]
    tokens = [
        sum(getattr(answer, name) for answer in answers)
        for name in ("input_tokens", "output_tokens")
    ]
    return Judged(
        outcomes=outcomes,
        first_share=verdicts["A"] / preferred if preferred and judge.sees_order else None,
        calls=len(answers),
        failures=dict(Counter(answer.failure for answer in answers if answer.failure)),
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        dollars=judge.dollars(*tokens) if isinstance(judge, Endpoint) else None,
    )
