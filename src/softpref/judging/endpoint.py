"""A judge: a chat model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from softpref.judging.account import Account
from softpref.judging.batch import Batches
from softpref.judging.calls import make_calls
from softpref.judging.client import Client, Server
from softpref.judging.failures import CUT_OFF, CUT_ONCE
from softpref.judging.forecast import SAMPLE_CALLS
from softpref.judging.journal import journal_path
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Answer, Question
from softpref.judging.reply import Reply
from softpref.judging.template import read_reply, render_question, reply_schema, template_version

GROWTH = 4
"""How much longer than `max_reply_tokens` the second reply may be, if the first was cut off."""


class Endpoint:
    """Asks one question per call, at temperature 0, with concurrent calls.

    A refusal, a reply without a verdict, and a call that failed after its retries are answers with
    a failure. A reply that is cut off before its verdict is asked for once more, with more room.

    Args:
        options: checked options.

    Attributes:
        account: what calls cost, and have cost so far.
        concurrency: calls at once.

    Raises:
        UsageError: the `openai` package or the key is missing.
    """

    sees_order = True

    def __init__(self, options: JudgeOptions) -> None:
        self._options = options
        self._has_called = False
        self.concurrency = options.concurrency
        self.account = Account(options.price_input, options.price_output, options.max_cost)
        server = Server(
            model=str(options.judge_model),
            base_url=options.base_url,
            api_key_env=options.api_key_env,
            timeout_s=options.timeout_s,
            max_retries=options.max_retries,
            what="judge",
            option="--judge_model",
            form="--structured_output words",
        )
        # Some models allow only their own temperature.
        self._client = Client(server, self.account, optional=["temperature"])
        self.longest_call = self._client.longest_call
        self.identity: Mapping[str, Any] = {
            "judge": "endpoint",
            "model": options.judge_model,
            "base_url": server.address,
            "structured_output": options.structured_output,
            "max_reply_tokens": options.max_reply_tokens,
            "template": template_version(options.grades),
        }
        if options.reasoning_effort:
            self.identity = {**self.identity, "reasoning_effort": options.reasoning_effort}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Yield answers as they arrive.

        Raises:
            UsageError: the server refuses every call, or a batch of an earlier run asks the same.
        """
        if self._options.batch:
            yield from Batches(self, self._client).ask(questions)
            return
        log = self.account.log
        if log and journal_path(log.path).exists():
            Batches(self, self._client).refuse_asked(questions)
        yield from make_calls(self, questions)

    def sample_size(self) -> int:
        """Return how many questions to ask at once before the first batch of a process.

        The first ones show what the rest costs; one shows which parameters the endpoint takes.
        """
        return 0 if self._has_called else 1 if self.account.has_answered else SAMPLE_CALLS

    def call(self, question: Question) -> Answer:
        """Ask a question."""
        parameters = self._parameters(question)
        bounds = self._bounds(parameters, question)
        reply = self._client.call(parameters, self._max_reply(question), bounds)
        self._has_called |= not reply.failure
        return self.answer(question, reply)

    def abandoned(self, question: Question) -> Answer:
        """Return the answer to a question whose call exceeded its total time."""
        return self.answer(question, Reply("", "timeout", billed=self.most_tokens(question)))

    def again(self, question: Question, answer: Answer) -> Question | None:
        """Return the question, with room for a longer reply, if this one was cut off."""
        return replace(question, attempt=1) if answer.failure == CUT_ONCE else None

    def billed(self, answer: Answer) -> tuple[int, int]:
        """Return the tokens that may be billed."""
        return answer.billed_input_tokens, answer.billed_output_tokens

    def most_tokens(self, question: Question) -> tuple[int, int]:
        """Return upper bounds of the tokens of a question with all retries."""
        return self._bounds(self._parameters(question), question)

    def _bounds(self, parameters: Mapping[str, Any], question: Question) -> tuple[int, int]:
        texts = [message["content"] for message in parameters["messages"]]
        return self._client.most_tokens(texts, self._max_reply(question))

    def _max_reply(self, question: Question) -> int:
        return self._options.max_reply_tokens * GROWTH**question.attempt

    def request(self, question: Question) -> dict[str, Any]:
        """Return the body of a question's request."""
        return self._client.body(self._parameters(question), self._max_reply(question))

    def most_tokens_once(self, question: Question) -> tuple[int, int]:
        """Return upper bounds of the tokens of a question without retries."""
        texts = [message["content"] for message in self._parameters(question)["messages"]]
        return self._client.most_tokens(texts, self._max_reply(question), attempts=1)

    def answer(self, question: Question, reply: Reply) -> Answer:
        """Return the answer in a reply, or its failure."""
        tokens = (*reply.counted, *reply.billed)
        if question.attempt and reply.failure == "status 400":  # its context has no more room
            return Answer(None, CUT_OFF, "", *tokens)
        if reply.failure:
            return Answer(None, reply.failure, "", *tokens)
        read = read_reply(reply.text, self._options.grades)
        if read is None and reply.is_cut:
            return Answer(None, CUT_OFF if question.attempt else CUT_ONCE, "", *tokens)
        if read is None:
            return Answer(None, "no verdict", "", *tokens)
        return Answer(read[0], None, read[1], *tokens)

    def _parameters(self, question: Question) -> dict[str, Any]:
        """Return the request of a question, fenced by a mark that is new."""
        fence, grades = f"<{secrets.token_hex(12)}>", self._options.grades
        parameters: dict[str, Any] = {
            "messages": render_question(question, fence, grades),
            "temperature": 0,
        }
        if self._options.reasoning_effort:
            parameters["reasoning_effort"] = self._options.reasoning_effort
        if self._options.structured_output == "schema":
            schema = {"name": "verdict", "schema": reply_schema(grades), "strict": True}
            parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
        return parameters
