"""A judge: a chat model behind an OpenAI-compatible endpoint.

The `openai` package handles retries, backoff, jitter, `Retry-After` and timeouts.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from softpref.errors import UsageError, require_package
from softpref.judging.bounded import bounded_client
from softpref.judging.options import JudgeOptions, public_address
from softpref.judging.questions import Answer, Grades, Question
from softpref.judging.reply import read_completion
from softpref.judging.template import render_question, reply_schema, template_version

if TYPE_CHECKING:
    from openai import OpenAI

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
LONGEST_WAIT = 120.0
"""Seconds between two attempts of a call; `openai` ignores a longer `Retry-After`."""
CHARACTERS_A_TOKEN = 4  # in English text; for the estimate before the first call
MILLION = 1e6
HIDDEN = "[key]"
REDIRECTS = (301, 302, 303, 307, 308)

_Results = queue.SimpleQueue[tuple[int, Answer | Exception]]


class Endpoint:
    """Asks one question per call, at temperature 0, with concurrent calls.

    A refusal, a reply without a verdict, and a call that failed after its retries are answers with
    a failure. Calls stop early, leaving questions unanswered, if the next call could exceed
    `max_cost`.

    Args:
        options: checked options.

    Attributes:
        spent: upper bound of the dollars spent, including those of earlier runs.
        has_answered: whether any call succeeded, so that key and address must be valid.

    Raises:
        UsageError: the `openai` package or the key is missing.
    """

    sees_order = True

    def __init__(self, options: JudgeOptions) -> None:
        self._options = options
        self._client = _client(options)
        address = public_address(options.base_url or OPENAI)
        if variable := key_variable(options):
            logger.info("judge %s: sends $%s to %s", options.judge_model, variable, address)
        self._refused_parameters: set[str] = set()
        self.spent = 0.0
        self.has_answered = False
        self.identity: Mapping[str, Any] = {
            "judge": "endpoint",
            "model": options.judge_model,
            "base_url": address,
            "structured_output": options.structured_output,
            "max_reply_tokens": options.max_reply_tokens,
            "template": template_version(options.grades),
        }

    def estimate(self, questions: Sequence[Question]) -> tuple[int, int]:
        """Return the approximate input tokens and the maximum output tokens of questions."""
        characters = sum(
            len(message["content"])
            for question in questions
            for message in _messages(question, self._options.grades)
        )
        replies = len(questions) * self._options.max_reply_tokens
        return characters // CHARACTERS_A_TOKEN, replies

    def dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        """Return the cost of tokens; None without prices."""
        prices = (self._options.price_input, self._options.price_output)
        if None in prices:
            return None
        of_input, of_output = (cast(float, price) for price in prices)
        return (input_tokens * of_input + output_tokens * of_output) / MILLION

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Yield answers as they arrive; abandon a call that exceeds its total time."""
        asked: queue.SimpleQueue[tuple[int, Question] | None] = queue.SimpleQueue()
        answered: _Results = queue.SimpleQueue()
        limit, workers, abandoned = min(self._options.concurrency, len(questions)), 0, 0
        left, reserved, numbers = deque(questions), 0.0, itertools.count()
        in_flight: dict[int, tuple[Question, float]] = {}  # the oldest first
        try:
            while True:
                while left and len(in_flight) < limit and self._is_affordable(reserved, left[0]):
                    reserved += self._worst_cost(left[0])
                    number, question = next(numbers), left.popleft()
                    in_flight[number] = question, time.monotonic() + self._longest_call()
                    asked.put((number, question))
                if not in_flight:
                    return
                while workers < limit + abandoned:
                    workers += 1
                    # Daemons, since an interrupted command must not wait for pending calls.
                    work = threading.Thread(target=self._work, args=(asked, answered), daemon=True)
                    work.start()
                number, answer = self._next(answered, in_flight)
                if number not in in_flight:  # it was abandoned
                    continue
                question, _ = in_flight.pop(number)
                reserved -= self._worst_cost(question)
                if answer is None:
                    answer = self._unmetered("timeout", question)
                    abandoned += 1
                if isinstance(answer, Exception):
                    raise answer
                self.spent += (
                    self.dollars(answer.billed_input_tokens, answer.billed_output_tokens) or 0.0
                )
                yield question, answer
        finally:
            for _ in range(workers):
                asked.put(None)

    def _next(
        self, answered: _Results, in_flight: Mapping[int, tuple[Question, float]]
    ) -> tuple[int, Answer | Exception | None]:
        """Return the next answer, or None for the oldest call after its deadline."""
        number, (_, end) = next(iter(in_flight.items()))
        try:
            return answered.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            return number, None

    def _longest_call(self) -> float:
        """Return the maximum seconds of a call with all its retries."""
        attempts = 1 + self._options.max_retries
        return attempts * self._options.timeout_s + self._options.max_retries * LONGEST_WAIT

    def _work(self, asked: Any, answered: _Results) -> None:
        while (item := asked.get()) is not None:
            number, question = item
            try:
                answered.put((number, self._answer(question)))
            except Exception as error:
                answered.put((number, error))

    def _max_tokens(self, question: Question) -> tuple[int, int]:
        """Return a bound of the tokens of a call with all its retries, one token per byte."""
        texts = [message["content"] for message in _messages(question, self._options.grades)]
        attempts = 1 + self._options.max_retries
        size = sum(len(text.encode()) for text in texts)
        return attempts * size, attempts * self._options.max_reply_tokens

    def _worst_cost(self, question: Question) -> float:
        return self.dollars(*self._max_tokens(question)) or 0.0

    def _is_affordable(self, reserved: float, question: Question) -> bool:
        limit = self._options.max_cost
        return limit is None or self.spent + reserved + self._worst_cost(question) <= limit

    def _answer(self, question: Question) -> Answer:
        import openai

        request = self._request(question)
        try:
            completion = self._client.chat.completions.create(**request)
            answer = read_completion(completion, self._max_tokens(question), self._options.grades)
        except openai.BadRequestError as error:
            refused = str(error.param)  # any JSON value from the endpoint
            if refused in {"max_tokens", "temperature"} & request.keys():
                self._refused_parameters.add(refused)
                return self._answer(question)
            return self._status_answer(error.status_code)
        except openai.APIStatusError as error:
            return self._status_answer(error.status_code)
        except (openai.APITimeoutError, TimeoutError):
            return self._unmetered("timeout", question)
        except openai.APIConnectionError as error:
            is_slow = isinstance(error.__cause__, TimeoutError)
            return self._unmetered("timeout" if is_slow else "no connection", question)
        except Exception:  # the body may have any shape, size or depth
            return self._unmetered("broken reply", question)
        self.has_answered = True
        if key_variable(self._options):  # an endpoint may echo the key
            redacted = answer.justification.replace(self._client.api_key, HIDDEN)
            answer = dataclasses.replace(answer, justification=redacted)
        return answer

    def _unmetered(self, failure: str, question: Question) -> Answer:
        """Return a failed answer that may have been billed."""
        size, replies = self._max_tokens(question)
        return Answer(None, failure, billed_input_tokens=size, billed_output_tokens=replies)

    def _request(self, question: Question) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self._options.judge_model,
            "messages": _messages(question, self._options.grades),
        }
        if "temperature" not in self._refused_parameters:  # some models allow only their default
            request["temperature"] = 0
        is_renamed = "max_tokens" in self._refused_parameters
        limit = "max_completion_tokens" if is_renamed else "max_tokens"
        request[limit] = self._options.max_reply_tokens
        if self._options.structured_output == "schema":
            schema = {
                "name": "verdict",
                "schema": reply_schema(self._options.grades),
                "strict": True,
            }
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request

    def _status_answer(self, status: int) -> Answer:
        """Return the failure of one question; stop if the status concerns every call.

        The endpoint's message is not repeated, since it may contain the key.
        """
        key = key_variable(self._options) or "--api_key_env"
        remedies = {
            401: f"set {key} to a valid key",
            403: f"the key in {key} may not use this model",
            404: "check --base_url (it ends in /v1) and --judge_model",
            422: "try --structured_output words",
        } | dict.fromkeys(REDIRECTS, "redirects are not followed: set --base_url to where it leads")
        if status == 401 or (status in remedies and not self.has_answered):
            address = public_address(self._options.base_url or OPENAI)
            raise UsageError(f"{address} answers {status}: {remedies[status]}.")
        return Answer(None, f"status {status}")


def _messages(question: Question, grades: Grades) -> list[dict[str, str]]:
    return render_question(question, f"<{secrets.token_hex(12)}>", grades)


def key_variable(options: JudgeOptions) -> str | None:
    """Return the variable with the key; OpenAI's key is sent only to OpenAI."""
    return options.api_key_env or (None if options.base_url else OPENAI_KEY)


def _client(options: JudgeOptions) -> OpenAI:
    require_package("openai", "judge", "--judge endpoint")
    from openai import OpenAI

    variable = key_variable(options)
    key = os.environ.get(variable, "").strip() if variable else "none"
    if not key and options.api_key_env:  # never print it: it may be a key, given by mistake
        raise UsageError(
            "--api_key_env: no such variable is set; give the name of the variable that holds the "
            "key, not the key."
        )
    if not key:
        raise UsageError(
            f"{variable} is not set: set it to the key, or name another variable with "
            "api_key_env; for a server that needs no key, give base_url."
        )
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{variable} is not a key: it has characters that no key contains.")
    address, timeout, retries = options.base_url or OPENAI, options.timeout_s, options.max_retries
    client = bounded_client(timeout)
    return OpenAI(
        api_key=key, base_url=address, timeout=timeout, max_retries=retries, http_client=client
    )
