"""Responses of a policy behind an OpenAI-compatible server, one call per response."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softpref.data.messages import as_text
from softpref.errors import UsageError
from softpref.judging.account import Account
from softpref.judging.calls import make_calls
from softpref.judging.client import Client, Server
from softpref.judging.failures import CUT_OFF, Streak, stopped
from softpref.judging.generate_options import GenerateOptions
from softpref.judging.log import Lines, resume_from
from softpref.judging.reply import Reply, encodable
from softpref.judging.responses import Prompt, text_to_continue
from softpref.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """A response to be written.

    Attributes:
        sample: its number among the responses to its prompt.
        prompt: number of the prompt.
        parameters: of the request.
        texts: what of them is counted as tokens.
    """

    sample: int
    prompt: int
    parameters: Mapping[str, Any]
    texts: Sequence[str]


class Writer:
    """Asks a server for one response per call.

    Args:
        options: checked options, with `max_new_tokens`.

    Raises:
        UsageError: the `openai` package or the key is missing.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self.account = Account(options.price_input, options.price_output, options.max_cost)
        self.concurrency = options.concurrency
        self._longest = int(options.max_new_tokens or 0)
        server = Server(
            model=options.model,
            base_url=options.base_url,
            api_key_env=options.api_key_env,
            timeout_s=options.timeout_s,
            max_retries=options.max_retries,
            what="generate",
            option="--model",
            form="--prompt_format chat",
        )
        # Not every server draws by a seed; responses are then not the same again.
        self._client = Client(server, self.account, optional=["seed"])
        self.longest_call = self._client.longest_call

    def call(self, order: Order) -> Reply:
        """Ask for a response."""
        reply = self._client.call(order.parameters, self._longest, self.most_tokens(order))
        if reply.failure == "refusal" and reply.text:  # it is what the model says
            return replace(reply, failure=None)
        if reply.failure is None and reply.is_cut and not reply.text.strip():
            return replace(reply, failure=CUT_OFF)
        return reply

    def abandoned(self, order: Order) -> Reply:
        """Return the reply of a call that exceeded its total time."""
        return Reply("", "timeout", billed=self.most_tokens(order))

    def again(self, order: Order, reply: Reply) -> None:
        """Ask for nothing more."""

    def billed(self, reply: Reply) -> tuple[int, int]:
        """Return the tokens that may be billed."""
        return reply.billed

    def most_tokens(self, order: Order) -> tuple[int, int]:
        """Return upper bounds of the tokens of a call with all its retries."""
        return self._client.most_tokens(order.texts, self._longest)


def orders_of(prompts: Sequence[Prompt], options: GenerateOptions) -> list[Order]:
    """Return what to ask for: `samples` responses to every prompt.

    Raises:
        UsageError: a prompt does not have the format.
    """
    return [
        _order(n, i, given, options)
        for n in range(options.samples)
        for i, given in enumerate(prompts)
    ]


def served_responses(
    orders: Sequence[Order],
    writer: Writer,
    options: GenerateOptions,
    record: Mapping[str, Any],
    progress: Path,
) -> tuple[list[list[str]], dict[str, int]]:
    """Return a list of responses per sample, in the prompts' order, and the failures by kind.

    Each response is on disk before the next call. What an interrupted command has written is not
    asked for again.

    Args:
        orders: from `orders_of`.
        writer: asks the server.
        options: checked options, with `max_new_tokens`.
        record: settings that responses depend on.
        progress: the file of what has come.

    Raises:
        UsageError: the server rejects the calls, `max_cost` is reached, or some calls failed and
            their responses are not to be empty.
    """
    found, billed = _written(progress, resume_from(progress, record))
    writer.account.spent = writer.account.dollars(*billed) or 0.0
    missing = [order for order in orders if (order.sample, order.prompt) not in found]
    streak = Streak(len(missing), bool(found))
    failures: Counter[str] = Counter()
    stop = None
    lines = Lines(progress)
    try:
        lines.read()
        done = len(orders) - len(missing)
        with Progress("generating", len(orders), "response", done=done) as bar:
            for order, reply in make_calls(writer, missing):
                bar.update()
                text = None if reply.failure else reply.text
                place = {"sample": order.sample, "prompt": order.prompt}
                lines.add(place | {"text": text, "billed": reply.billed})
                if text is None:
                    failures[str(reply.failure)] += 1
                else:
                    found[order.sample, order.prompt] = text
                if not stop and streak.add(order, reply.failure):
                    stop = UsageError(_stopped(str(reply.failure), len(streak.items), options))
                    writer.account.is_stopped = True  # calls in flight are paid: count them, too
    finally:
        lines.close()
    if stop:
        raise stop
    if writer.account.dollars(0, 0) is not None:
        logger.info("generating: at most %.2f dollars so far", writer.account.spent)
    _refuse_missing_responses(len(found), len(orders), failures, options)
    texts = [found.get((order.sample, order.prompt), "") for order in orders]
    count = len(orders) // options.samples
    samples = [texts[n * count : (n + 1) * count] for n in range(options.samples)]
    return samples, dict(failures)


def _refuse_missing_responses(
    found: int, orders: int, failures: Counter[str], options: GenerateOptions
) -> None:
    """Refuse responses that were not asked for, or failed and are not to be empty.

    Raises:
        UsageError: the message counts them.
    """
    if left := orders - found - failures.total():
        raise UsageError(
            f"--max_cost {options.max_cost} dollars: {left:,} of {orders:,} responses were not "
            "asked for, because the next call could have exceeded it; run the same command with a "
            "larger --max_cost to continue."
        )
    if failures:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(failures.items()))
        failed = f"{failures.total():,} of {orders:,} responses failed ({kinds})"
        if not options.failed_as_empty:
            raise UsageError(
                f"{failed}: the same command asks for these alone again; --failed_as_empty true "
                "writes them as empty responses."
            )
        logger.warning("%s and are written as empty responses", failed)


def _stopped(failure: str, count: int, options: GenerateOptions) -> str:
    longest = int(options.max_new_tokens or 0)
    remedies = {
        CUT_OFF: f"replies do not fit into {longest:,} tokens: give a larger --max_new_tokens",
        "status 400": "give a smaller --max_new_tokens if the model's context cannot hold it, and "
        "check --model",
    }
    return stopped(failure, count, "--model", remedies)


def _order(sample: int, number: int, given: Prompt, options: GenerateOptions) -> Order:
    prompt = text_to_continue(given, options.prompts, options.prompt_format)
    parameters: dict[str, Any] = {}
    if options.temperature is not None:
        parameters["temperature"] = options.temperature
    if options.temperature:
        text = f"{options.seed}/{sample}/{number}"
        parameters["seed"] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
    if isinstance(prompt, str):
        return Order(sample, number, parameters | {"prompt": prompt}, [prompt])
    parameters["messages"] = prompt
    if tools := given.context.get("tools"):
        parameters["tools"] = tools
    if further := given.context.get("chat_template_kwargs"):
        parameters["extra_body"] = {"chat_template_kwargs": further}
    return Order(sample, number, parameters, [as_text(prompt), str(given.context)])


def _written(
    progress: Path, rows: Sequence[Any]
) -> tuple[dict[tuple[int, int], str], tuple[int, int]]:
    """Return the responses in a progress file, and the tokens that may be billed for all calls.

    Raises:
        UsageError: the file is damaged.
    """
    found, billed = {}, [0, 0]
    try:
        for row in rows:
            text, place = row["text"], (int(row["sample"]), int(row["prompt"]))
            if isinstance(text, str):
                found[place] = encodable(text)
            elif text is not None:
                raise TypeError
            sent, received = map(int, row.get("billed", (0, 0)))  # none in files of before
            billed = [billed[0] + sent, billed[1] + received]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{progress}: is damaged; delete it to start over.") from None
    return found, (billed[0], billed[1])
