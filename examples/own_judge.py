"""Bring your own judge: any rule or model that prefers one of two responses.

python examples/own_judge.py KNOWN RESPONSES BASELINE OUTPUT

First measure the judge on KNOWN, pairs whose better response is known; then count wins. A judge
behind an OpenAI-compatible server needs no code: `softpref compare --base_url ADDRESS`.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from softpref.judging.ask import Judged, ask_judge
from softpref.judging.check import judge_quality, load_gold
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Answer, Comparison, Question
from softpref.judging.rates import judged_rate
from softpref.judging.responses import join


class FewestRepeats:
    """Prefer the response that repeats fewer of its words."""

    identity: Mapping[str, Any] = {"judge": "fewest repeats", "version": 1}  # part of the log's key
    sees_order = False  # true for a judge that reads A before B; it is then asked in both orders
    account = None  # a judge that is paid has a softpref.judging.account.Account

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Yield a verdict for each question: A, B or tie."""
        for question in questions:
            first, second = _repeats(question.first), _repeats(question.second)
            verdict = "A" if first < second else "B" if second < first else "tie"
            yield question, Answer(verdict)


def _repeats(response: Any) -> int:
    words = str(response).lower().split()
    return len(words) - len(set(words))


def judged(comparisons: Sequence[Comparison]) -> Judged:
    """Ask the judge; verdicts are logged, so that the same command resumes."""
    with VerdictLog(Path(output) / "verdicts.jsonl") as log:
        return ask_judge(comparisons, FewestRepeats(), JudgeOptions(), log)


known, responses, baseline, output = sys.argv[1:]
quality = judge_quality(judged(load_gold(known)))
print(f"right in {quality.right:.1%} of {quality.pairs} known pairs, ties in {quality.ties:.1%}")
found = judged(join(responses, baseline))
rate = judged_rate(found.outcomes, found.first_share)
print(f"wins {rate.wins}, losses {rate.losses}, ties {rate.ties}")
if rate.rate is not None:
    low, high = rate.clustered_interval
    print(f"win rate {rate.rate:.1%} (95% interval {low:.1%} to {high:.1%})")
