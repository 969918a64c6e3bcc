"""A chat model behind an OpenAI-compatible endpoint as a judge.

Retries, their backoff and jitter, `Retry-After` and timeouts are the `openai` package's.
"""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from softpref.errors import UsageError
from softpref.judging.options import JudgeOptions, public_address
from softpref.judging.questions import Answer, Question
from softpref.judging.template import SCHEMA, read_reply, render, template_version

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

OPENAI = "https://api.openai.com/v1"
CHARACTERS_A_TOKEN = 4  # of English; the estimate before the first call
MILLION = 1e6


class Endpoint:
    """Asks one question a call, at temperature 0, several calls at a time.

    A refusal, a reply that is no verdict, and a call that failed after its retries are answers with
    a failure. Calls end early, leaving questions unanswered, where the next one could take the
    account above `max_cost`.

    Args:
        options: who is asked and how; checked.

    Attributes:
        spent: dollars of the account so far; what earlier runs paid is set from their log.

    Raises:
        UsageError: the `openai` package or the key is missing, or the address is none.
    """

    sees_order = True

    def __init__(self, options: JudgeOptions) -> None:
        self._options = options
        self._client = _client(options)
        self.spent = 0.0
        self.identity: Mapping[str, Any] = {
            "judge": "endpoint",
            "model": options.judge_model,
            "base_url": public_address(options.base_url or OPENAI),
            "structured_output": options.structured_output,
            "max_reply_tokens": options.max_reply_tokens,
            "template": template_version(),
        }

    def estimate(self, questions: Sequence[Question]) -> tuple[int, int]:
        """Return about how many tokens the questions have, and how many replies have at most."""
        characters = sum(
            len(message["content"]) for question in questions for message in _messages(question)
        )
        replies = len(questions) * self._options.max_reply_tokens
        return characters // CHARACTERS_A_TOKEN, replies

    def dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        """Return what tokens cost; None where prices were not given."""
        prices = (self._options.price_input, self._options.price_output)
        if None in prices:
            return None
        by_input, by_output = (cast(float, price) for price in prices)
        return (input_tokens * by_input + output_tokens * by_output) / MILLION

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Yield answers as they come."""
        waiting: dict[Future[Answer], tuple[Question, float]] = {}
        left = deque(questions)
        pool = ThreadPoolExecutor(self._options.concurrency)
        try:
            while True:
                while left and len(waiting) < self._options.concurrency:
                    worst = self._worst_cost(left[0])
                    if not self._affords(worst + sum(cost for _, cost in waiting.values())):
                        break  # what is in flight may turn out cheaper
                    question = left.popleft()
                    waiting[pool.submit(self._answer, question)] = (question, worst)
                if not waiting:
                    return
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    question, _ = waiting.pop(done)
                    answer = done.result()
                    self.spent += self.dollars(answer.input_tokens, answer.output_tokens) or 0.0
                    yield question, answer
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _worst_cost(self, question: Question) -> float:
        # A token is a byte at least, so this bounds what the text can cost.
        texts = [message["content"] for message in _messages(question)]
        size = sum(len(text.encode("utf-8", "replace")) for text in texts)
        return self.dollars(size, self._options.max_reply_tokens) or 0.0

    def _affords(self, cost: float) -> bool:
        return self._options.max_cost is None or self.spent + cost <= self._options.max_cost

    def _answer(self, question: Question) -> Answer:
        import openai

        try:
            reply = self._client.chat.completions.create(**self._request(question))
        except openai.APIStatusError as error:
            return self._of_status(error.status_code)
        except openai.APITimeoutError:
            return Answer(None, "timeout")
        except openai.APIConnectionError:
            return Answer(None, "no connection")
        except (openai.OpenAIError, ValueError):  # a body that is not JSON, or not a completion
            return Answer(None, "broken reply")
        return _read(reply)

    def _request(self, question: Question) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self._options.judge_model,
            "messages": _messages(question),
            "temperature": 0,
            "max_tokens": self._options.max_reply_tokens,
        }
        if self._options.structured_output == "schema":
            schema = {"name": "verdict", "schema": SCHEMA, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request

    def _of_status(self, status: int) -> Answer:
        """Tell what concerns this question from what concerns every call, which ends the asking.

        The endpoint's own words are not repeated: some name the key.
        """
        remedies = {
            401: f"set {self._options.api_key_env} to a valid key",
            403: f"the key in {self._options.api_key_env} may not use this model",
            404: "check --base_url (it ends in /v1) and --judge_model",
            422: "try --structured_output off",
        }
        if status in remedies:
            address = public_address(self._options.base_url or OPENAI)
            raise UsageError(f"{address} answers {status}: {remedies[status]}.")
        return Answer(None, f"status {status}")


def _messages(question: Question) -> list[dict[str, str]]:
    return render(question, f"<{secrets.token_hex(12)}>")


def _read(reply: ChatCompletion) -> Answer:
    """Return the verdict in a completion, or why there is none."""
    usage = getattr(reply, "usage", None)
    tokens = [
        int(getattr(usage, name, None) or 0) for name in ("prompt_tokens", "completion_tokens")
    ]
    choices = getattr(reply, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        return Answer(None, "broken reply", "", *tokens)
    choice = choices[0]
    if getattr(choice.message, "refusal", None) or choice.finish_reason == "content_filter":
        return Answer(None, "refusal", "", *tokens)
    read = read_reply(choice.message.content)
    if read is None:
        cut = choice.finish_reason == "length"
        return Answer(None, "cut off" if cut else "no verdict", "", *tokens)
    verdict, justification = read
    return Answer(verdict, None, justification, *tokens)


def _client(options: JudgeOptions) -> OpenAI:
    try:
        from openai import OpenAI
    except ImportError:
        raise UsageError(
            "--judge endpoint needs the openai package: pip install 'softpref[judge]'."
        ) from None
    key = os.environ.get(options.api_key_env)
    if not key and not options.base_url:
        raise UsageError(
            f"{options.api_key_env} is not set: put the key there, or name another variable by "
            "--api_key_env; a server that needs none is named by --base_url."
        )
    address = options.base_url or OPENAI
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise UsageError(f"--base_url {address}: must be like http://localhost:8000/v1.")
    return OpenAI(
        api_key=key or "none", base_url=address, timeout=options.timeout_s,
        max_retries=options.max_retries,
    )  # fmt: skip
