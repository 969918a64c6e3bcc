"""The log lines that say what calls will cost: an estimate first, then a measurement."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import monotonic

from softpref.judging.account import BATCH_SHARE, Account
from softpref.judging.forecast import SAMPLE_CALLS, CountedCall, Forecast, forecast, spread
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Question
from softpref.judging.template import question_size
from softpref.training.progress_lines import duration

logger = logging.getLogger(__name__)

CHARACTERS_A_TOKEN = 4  # in English text; for the estimate before the first call


class Preview:
    """Logs what the calls to a paid judge will cost, once that can be measured.

    Args:
        what: name of the calls.
        every: all questions by key.
        missing: those to ask, in this order.
        account: of the judge.
        options: of the judge.
        log: the answers so far.
    """

    def __init__(
        self,
        what: str,
        every: Mapping[str, Question],
        missing: Mapping[str, Question],
        account: Account,
        options: JudgeOptions,
        log: VerdictLog,
    ) -> None:
        self._what, self._every, self._missing = what, every, missing
        self._account, self._options, self._log = account, options, log
        known = [key for key in every if key not in missing and log.counted([key])[0]]
        is_measured = len(known) >= SAMPLE_CALLS
        self._sample = [known[i] for i in spread(len(known))[:SAMPLE_CALLS]] if is_measured else []
        self._waits = set() if is_measured else set(list(missing)[:SAMPLE_CALLS])
        self._sample += self._waits
        self._answered: set[str] = set()
        self._start = monotonic()
        text = f"{len(missing):,} calls"
        if before := len(every) - len(missing):
            text += f", {before:,} answered before"
        logger.info("%s: %s%s", what, text, self._guess() if missing else "")
        if is_measured and missing:
            self._log_forecast()

    def answered(self, key: str) -> None:
        """Take note of an answer; log the measurement when the sample is complete."""
        self._answered.add(key)
        if key in self._waits:
            self._waits.remove(key)
            if not self._waits and len(self._answered) < len(self._missing):
                self._log_forecast()

    def _size(self, question: Question) -> int:
        return question_size(question, self._options.grades)

    def _guess(self) -> str:
        """Return an estimate without any reply; replies that are cut off cost more."""
        inputs = sum(map(self._size, self._missing.values())) // CHARACTERS_A_TOKEN
        replies = len(self._missing) * self._options.max_reply_tokens
        text = f"; about {inputs:,} input and {replies:,} output tokens"
        dollars = self._account.dollars(inputs, replies)
        if dollars is not None:
            share = BATCH_SHARE if self._options.batch else 1
            text += f", {share * dollars:.2f} dollars"
        return f"{text}, if each reply takes --max_reply_tokens {self._options.max_reply_tokens}"

    def _log_forecast(self) -> None:
        left = [q for key, q in self._missing.items() if key not in self._answered]
        sample = [
            CountedCall(self._size(self._every[key]), *self._log.counted([key]))
            for key in self._sample
        ]
        found = forecast(sample, [*map(self._size, left)], self._account)
        if found is None:
            logger.info("%s: the endpoint counts no tokens, so the cost is not known", self._what)
            return
        text = f"{len(left):,} more calls take {self._text(found, len(left))}"
        logger.info("%s: %s (measured on %d calls, 95%%)", self._what, text, SAMPLE_CALLS)

    def _text(self, found: Forecast, calls: int) -> str:
        (inputs, of_inputs), (outputs, of_outputs) = found.input_tokens, found.output_tokens
        text = (
            f"{inputs:,.0f} ± {of_inputs:,.0f} input and {outputs:,.0f} ± {of_outputs:,.0f} output "
            "tokens"
        )
        if found.dollars:
            share = BATCH_SHARE if self._options.batch else 1
            dollars, margin = (share * each for each in found.dollars)
            text += f", {dollars:.2f} ± {margin:.2f} dollars"
            if not self._account.allows(dollars):
                text += f", more than --max_cost {self._account.limit} leaves"
        if self._options.batch:
            return f"{text}, up to 24 hours per batch"
        if self._answered:
            seconds = (monotonic() - self._start) / len(self._answered) * calls
            text += f", about {duration(seconds)}"
        return text
