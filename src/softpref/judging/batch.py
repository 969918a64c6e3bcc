"""Questions in OpenAI's batches: upload, create, poll, and read what came, across kills.

A batch is paid once it is created. So a part's name is on disk before, the batch carries the name,
and a part without a known batch is looked for among the server's batches before it is created.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from softpref.errors import UsageError
from softpref.judging.account import Account
from softpref.judging.bounded import LONGEST_BODY, bounded_client
from softpref.judging.client import Client
from softpref.judging.failures import CUT_ONCE, GIVE_UP_AFTER, NOT_MADE
from softpref.judging.journal import Journal, Part, journal_path
from softpref.judging.questions import BATCH_SHARE, Answer, Question
from softpref.judging.reply import Reply, read_completion

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_CALLS, MOST_BYTES = 2_000, 50_000_000
"""Of one batch. OpenAI allows more; a smaller one bounds what is read of its answers."""
FIRST_WAIT, LONGEST_POLL = 5.0, 60.0
"""Seconds between two looks at a batch: at first, and in the end."""
BYTES_A_TOKEN, BYTES_A_LINE = 12, 4_000
"""Upper bounds of an answer's size in a result file."""
MOST_BATCHES = 2_000
"""How many of the server's batches are searched, newest first."""
PATH: Final = "/v1/chat/completions"
LONGEST_BATCH = 26 * 3600.0
"""Seconds; OpenAI ends a batch after 24 hours."""
UNDER_WAY = ("validating", "in_progress", "finalizing", "cancelling")
ENDED = ("completed", "expired", "cancelled", "failed")
_ID = re.compile(r"[\w-]{1,200}")


class Asker(Protocol):
    """What a batch needs of an endpoint."""

    account: Account

    def request(self, question: Question) -> dict[str, Any]:
        """Return the body of a question's request."""

    def most_tokens_once(self, question: Question) -> tuple[int, int]:
        """Return upper bounds of the tokens of a request of a question, without retries."""

    def answer(self, question: Question, reply: Reply) -> Answer:
        """Return the answer in a reply."""

    def again(self, question: Question, answer: Answer) -> Question | None:
        """Return what to ask next because of this answer, if anything."""


class Batches:
    """Asks questions in batches.

    Args:
        asker: makes requests of questions, and answers of replies.
        client: of the server.
    """

    def __init__(self, asker: Asker, client: Client) -> None:
        self._asker, self._client, self._account = asker, client, asker.account
        assert self._account.log
        self._log = self._account.log
        self._repeated: set[str] = set()

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Yield answers as batches end; what earlier runs submitted is not submitted again.

        Batches stop early, leaving questions out, if the next one could exceed the account's limit.

        Raises:
            UsageError: the server does not take batches, or cannot be reached.
        """
        judge = self._account.judge
        left = {question.key(judge): question for question in questions}
        journal = Journal(journal_path(self._log.path))
        try:
            while left:
                parts = [
                    part
                    for part in journal.parts.values()
                    if part.judge == judge and not part.is_done and self._pending(part, left)
                    if self._is_submitted(part, journal)
                ]
                for part in self._new_parts(left, parts, journal):
                    self._submit(part, left, journal)
                    parts.append(part)
                if not parts:
                    return
                part, batch = self._first_ended(parts)
                if batch.status == "failed":
                    journal.note(part, is_done=True)
                    raise UsageError(_failed(part, batch))
                yield from self._collected(part, batch, left)
                if not self._pending(part, part.keys):
                    journal.note(part, is_done=True)
        finally:
            journal.close()

    def _pending(self, part: Part, among: Mapping[str, Any]) -> list[str]:
        """Return the keys of a part whose answers are not yet in the log."""
        lines = self._log.lines
        return [key for key, before in part.keys.items() if lines[key] == before and key in among]

    def _cost(self, question: Question) -> float:
        tokens = self._asker.most_tokens_once(question)
        return BATCH_SHARE * (self._account.dollars(*tokens) or 0.0)

    def _new_parts(
        self, left: Mapping[str, Question], parts: Sequence[Part], journal: Journal
    ) -> Iterator[Part]:
        """Yield parts of what is in no part yet, as far as the account allows."""
        taken = {key for part in parts for key in self._pending(part, left)}
        reserved = sum(self._cost(left[key]) for key in taken)
        keys: dict[str, int] = {}
        size = 0
        for key, question in left.items():
            if key in taken:
                continue
            reserved += self._cost(question)
            if not self._account.allows(reserved):
                break
            size += len(json.dumps(self._asker.request(question)))
            if keys and (len(keys) == MOST_CALLS or size > MOST_BYTES):
                yield journal.new_part(self._account.judge, keys)
                keys, size = {}, 0
            keys[key] = self._log.lines[key]
        if keys:
            yield journal.new_part(self._account.judge, keys)

    def _is_submitted(self, part: Part, journal: Journal) -> bool:
        """Return whether a part has a batch; give up a part that a kill left without one."""
        if part.batch:
            return True
        if part.file and (found := self._lost(part)):
            journal.note(part, batch=self._id(found))
            return True
        journal.note(part, is_done=True)
        return False

    def _submit(self, part: Part, left: Mapping[str, Question], journal: Journal) -> None:
        """Upload a part and create its batch."""
        openai = self._client.openai
        fixed = {"method": "POST", "url": PATH}
        rows = [
            {"custom_id": key, **fixed, "body": self._asker.request(left[key])} for key in part.keys
        ]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = (f"softpref-{part.name}.jsonl", content)
        found = self._made("upload", lambda: openai.files.create(file=file, purpose="batch"))
        journal.note(part, file=self._id(found))
        # A repeated request could create a second batch, and both would be paid.
        once = openai.with_options(max_retries=0)
        try:
            made = once.batches.create(
                input_file_id=part.file,
                endpoint=PATH,
                completion_window="24h",
                metadata={"softpref": part.name},
            )
        except Exception as error:
            made = self._lost(part)
            if made is None:
                raise self._refusal(error, "create") from None
        journal.note(part, batch=self._id(made))
        logger.info("batch %s: %d calls submitted", part.batch, len(part.keys))

    def _lost(self, part: Part) -> Any:
        """Return the batch of a part, if the server has one."""
        pages = self._made("list", lambda: self._client.openai.batches.list(limit=100))

        def search() -> Any:
            for batch in itertools.islice(pages, MOST_BATCHES):
                if (getattr(batch, "metadata", None) or {}).get("softpref") == part.name:
                    return batch
            return None

        return self._made("list", search)

    def _first_ended(self, parts: Sequence[Part]) -> tuple[Part, Any]:
        """Wait until a batch has ended; return it."""
        wait, failures = FIRST_WAIT, 0
        seen: dict[str, str] = {}
        end = time.monotonic() + LONGEST_BATCH
        while True:
            for part in parts:
                try:
                    batch = self._polled(part)
                    failures = 0
                except UsageError:
                    failures += 1
                    if failures == GIVE_UP_AFTER:
                        raise
                    continue
                if seen.get(part.name) != batch.status:
                    logger.info("batch %s: %s", part.batch, batch.status)
                seen[part.name] = batch.status
                if batch.status in ENDED:
                    return part, batch
            if time.monotonic() > end:
                raise UsageError(
                    f"batch {parts[0].batch} has not ended in time; the same command waits again, "
                    "and submits nothing twice; or run without --batch after you cancelled it."
                )
            time.sleep(wait)
            wait = min(1.5 * wait, LONGEST_POLL)

    def _polled(self, part: Part) -> Any:
        """Return the batch of a part, with a status that batches have."""
        retrieve = partial(self._client.openai.batches.retrieve, part.batch)
        batch = self._made("poll", retrieve)
        if getattr(batch, "status", None) not in (*ENDED, *UNDER_WAY):
            raise self._refusal(ValueError(), "poll")
        return batch

    def _collected(
        self, part: Part, batch: Any, left: dict[str, Question]
    ) -> Iterator[tuple[Question, Answer]]:
        """Yield the answers of a batch that has ended; put back what is to be asked again."""
        keys = self._pending(part, left)
        if not keys:
            return
        longest = max(self._asker.most_tokens_once(left[key])[1] for key in keys)
        size = LONGEST_BODY + len(part.keys) * (BYTES_A_LINE + BYTES_A_TOKEN * longest)
        rows: dict[str, Mapping[str, Any]] = {}
        for kind in ("error_file_id", "output_file_id"):
            if isinstance(getattr(batch, kind, None), str):
                rows |= self._rows(self._id(batch, kind), size)
        is_whole = batch.status == "completed"
        for key in keys:
            question = left.pop(key)
            reply, is_learned = self._reply(question, rows.get(key), is_whole)
            answer = self._asker.answer(question, reply)
            self._account.spent += BATCH_SHARE * (self._account.dollars(*reply.billed) or 0.0)
            if answer.failure == CUT_ONCE:
                left[key] = self._asker.again(question, answer) or question
            elif is_learned:
                left[key] = question
            yield question, replace(answer, in_batch=True)

    def _rows(self, file: str, size: int) -> dict[str, Mapping[str, Any]]:
        """Return the lines of a result file by their call's key; what is no such line is left."""
        server = self._client.server
        reader = self._client.openai.with_options(
            http_client=bounded_client(server.timeout_s, size)
        )
        content = self._made("read", lambda: reader.files.content(file).content)
        rows = {}
        for line in content.split(b"\n"):
            try:
                row = json.loads(line)
                rows[str(row["custom_id"])] = row
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return rows

    def _reply(
        self, question: Question, row: Mapping[str, Any] | None, is_whole: bool
    ) -> tuple[Reply, bool]:
        """Return the reply in a line, and whether to repeat the call without a parameter."""
        bounds = self._asker.most_tokens_once(question)
        if row is None and not is_whole:
            return Reply("", NOT_MADE), False
        response = row.get("response") if row else None
        if row and row.get("error") is not None and not isinstance(response, dict):
            return Reply("", NOT_MADE), False
        if not isinstance(response, dict):
            return Reply("", "broken reply", billed=bounds), False
        status, body = response.get("status_code"), response.get("body")
        if status == 200:
            try:
                reply = read_completion(body, bounds)
            except RecursionError:
                return Reply("", "broken reply", billed=bounds), False
            return self._client.redacted_reply(reply), False
        if status == 400 and self._learns(body, question):
            return Reply("", NOT_MADE), True
        known = isinstance(status, int) and 100 <= status < 600
        return Reply("", f"status {status}" if known else "broken reply"), False

    def _learns(self, error: Any, question: Question) -> bool:
        """Return whether to repeat a call without the parameter that an error names, once."""
        key = question.key(self._account.judge)
        sent = {"max_tokens": 0, "temperature": 0} | self._asker.request(question)
        if key in self._repeated or not self._client.learn(error, sent):
            return False
        self._repeated.add(key)
        return True

    def _id(self, found: Any, name: str = "id") -> str:
        """Return an id that the server gave.

        Raises:
            UsageError: it is none.
        """
        value = getattr(found, name, None)
        is_id = isinstance(value, str) and _ID.fullmatch(value)
        if not is_id or self._client.redacted(str(value)) != value:
            raise UsageError(
                f"{self._client.server.address} gives no {name} for a batch: it may not have "
                "batches; run without --batch."
            )
        return str(value)

    def _made(self, what: str, request: Callable[[], T]) -> T:
        """Return the result of a request about batches.

        Raises:
            UsageError: it failed after its retries; the same command continues.
        """
        try:
            return request()
        except Exception as error:
            raise self._refusal(error, what) from None

    def _refusal(self, error: Exception, what: str) -> UsageError:
        """Return the error to raise; the server's message may contain the key."""
        status = getattr(error, "status_code", None)
        happened = f"answers {status}" if isinstance(status, int) else "does not answer"
        return UsageError(
            f"{self._client.server.address} {happened} to --batch ({what}): check key and quota, "
            "or run without --batch if it has none; the same command continues, and submits "
            "nothing twice."
        )


def _failed(part: Part, batch: Any) -> str:
    """Return a message about a batch that made no call."""
    codes = []
    for error in getattr(getattr(batch, "errors", None), "data", None) or []:
        code = getattr(error, "code", None)
        if isinstance(code, str) and re.fullmatch(r"[a-z_]{1,40}", code):
            codes.append(code)
    reasons = f" ({', '.join(dict.fromkeys(codes))})" if codes else ""
    return (
        f"batch {part.batch} failed{reasons} and cost nothing: check --judge_model and the batch "
        "limits of your account; run the same command to submit it again, or without --batch."
    )
