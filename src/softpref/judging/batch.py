"""Questions in OpenAI's batches: upload, create, poll, and read what came, across kills.

A batch is paid once created, so its name is on disk before, and looked for on the server first.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar

from softpref.errors import UsageError
from softpref.judging.account import BATCH_SHARE
from softpref.judging.bounded import LONGEST_BODY, bounded_client
from softpref.judging.calls import Caller, make_calls
from softpref.judging.client import Client
from softpref.judging.failures import (
    CUT_ONCE,
    GIVE_UP_AFTER,
    NOT_MADE,
    batch_failed,
    batch_remedy,
    is_passing,
    is_refused,
)
from softpref.judging.journal import Journal, Part, journal_path
from softpref.judging.questions import Answer, Question
from softpref.judging.reply import Reply, read_completion

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_CALLS, MOST_BYTES, MOST_ANSWERED = 2_000, 50_000_000, 120_000_000
"""Of one batch: calls, bytes sent and bytes received. OpenAI allows more; it must fit in memory."""
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


class Asker(Caller[Question, Answer], Protocol):
    """What a batch needs of an endpoint."""

    def sample_size(self) -> int:
        """Return how many questions to ask at once before the first batch."""

    def request(self, question: Question) -> dict[str, Any]:
        """Return the body of a question's request."""

    def most_tokens_once(self, question: Question) -> tuple[int, int]:
        """Return upper bounds of the tokens of a request of a question, without retries."""

    def answer(self, question: Question, reply: Reply) -> Answer:
        """Return the answer in a reply."""


class Batches:
    """Asks questions in batches.

    Args:
        asker: makes requests of questions, and answers of replies.
        client: of the server.
    """

    def __init__(self, asker: Asker, client: Client) -> None:
        self._asker, self._client, self._account = asker, client, asker.account
        assert self._account.log
        self._log, self._judge = self._account.log, self._account.judge
        self._repeated: set[tuple[str, str]] = set()

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Yield answers as batches end; what earlier runs submitted is not submitted again.

        Some questions are asked at once before the first batch. Batches stop early if the next one
        could exceed the account's limit; the remaining questions are not asked.

        Raises:
            UsageError: the server does not take batches, cannot be reached, or a batch failed;
                the others have been collected then.
        """
        left = {question.key(self._judge): question for question in questions}
        failure: UsageError | None = None
        sample_size = self._asker.sample_size()
        with closing(Journal(journal_path(self._log.path))) as journal:
            open_parts = [
                part
                for part in journal.unfinished(self._judge, self._log)
                if self._is_submitted(part, journal)
            ]
            self._account.spent += sum(map(self._outstanding, open_parts))
            while left:
                open_parts = [part for part in open_parts if part.pending(self._log)]
                parts = [part for part in open_parts if self._pending(part, left)]
                if not failure:
                    sample = self._unsent(left, parts)[:sample_size]
                    sample_size -= len(sample)
                    for question, answer in make_calls(self._asker, sample):
                        left.pop(question.key(self._judge), None)
                        yield question, answer
                    if self._account.is_stopped:
                        return
                    try:
                        for part in self._new_parts(left, parts, journal):
                            self._submit(part, left, journal)
                            self._account.spent += self._outstanding(part)
                            open_parts.append(part)
                    except UsageError as error:
                        failure = error
                parts = [part for part in open_parts if self._pending(part, left)]
                if not parts:
                    break
                part, batch = self._first_ended(parts)
                if batch.status == "failed":
                    journal.note(part, is_done=True)
                    self._account.spent -= self._outstanding(part)
                    open_parts.remove(part)
                    failure = failure or UsageError(batch_failed(part.batch, batch))
                    continue
                yield from self._collected(part, batch, left)
                if not part.pending(self._log):
                    journal.note(part, is_done=True)
        if failure:
            raise failure

    def refuse_asked(self, questions: Sequence[Question]) -> None:
        """Refuse to ask at once what a batch asks; reserve the dollars of all batches under way.

        Raises:
            UsageError: a batch asks some of the questions.
        """
        asked = {question.key(self._judge): question for question in questions}
        path = journal_path(self._log.path)
        with closing(Journal(path)) as journal:
            parts = journal.unfinished(self._judge, self._log)
        for part in parts:
            if keys := self._pending(part, asked):
                raise UsageError(
                    f"batch {part.batch or part.name} asks {len(keys)} of these questions: keep "
                    f"--batch true, or cancel it at the endpoint and delete {path}."
                )
            self._account.spent += self._outstanding(part)

    def _pending(self, part: Part, among: Mapping[str, Any]) -> list[str]:
        """Return the keys of a part whose answers are not yet in the log."""
        return [key for key in part.pending(self._log) if key in among]

    def _outstanding(self, part: Part) -> float:
        """Return the most dollars that the answers still to come from a part may cost."""
        return self._dollars(part.outstanding(self._log))

    def _dollars(self, tokens: tuple[int, int]) -> float:
        return BATCH_SHARE * (self._account.dollars(*tokens) or 0.0)

    def _unsent(self, left: Mapping[str, Question], parts: Sequence[Part]) -> list[Question]:
        """Return the questions that are in no part yet."""
        taken = {key for part in parts for key in self._pending(part, left)}
        return [question for key, question in left.items() if key not in taken]

    def _new_parts(
        self, left: Mapping[str, Question], parts: Sequence[Part], journal: Journal
    ) -> Iterator[Part]:
        """Yield parts of what is in no part yet, as far as the account allows."""
        keys: dict[str, int] = {}
        bounds: dict[str, tuple[int, int]] = {}
        sent, received, reserved = 0, 0, 0.0
        for question in self._unsent(left, parts):
            tokens = self._asker.most_tokens_once(question)
            if not self._account.allows(reserved + self._dollars(tokens)):
                break
            size = len(json.dumps(self._asker.request(question)))
            answer = BYTES_A_LINE + BYTES_A_TOKEN * tokens[1]
            is_full = sent + size > MOST_BYTES or received + answer > MOST_ANSWERED
            if keys and (len(keys) == MOST_CALLS or is_full):
                yield journal.new_part(self._judge, keys, bounds)
                keys, bounds = {}, {}
                sent, received, reserved = 0, 0, 0.0  # the account has the part's dollars now
            key = question.key(self._judge)
            keys[key], bounds[key] = self._log.lines[key], tokens
            sent, received = sent + size, received + answer
            reserved += self._dollars(tokens)
        if keys:
            yield journal.new_part(self._judge, keys, bounds)

    def _is_submitted(self, part: Part, journal: Journal) -> bool:
        """Return whether a part has a batch; give up a part that a kill left without one."""
        if not part.batch and (found := self._lost(part)):
            journal.note(part, batch=self._id(found, "list"))
        if not part.batch:
            journal.note(part, is_done=True)
        return bool(part.batch)

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
        journal.note(part, file=self._id(found, "upload"))
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
            if is_refused(error):
                journal.note(part, is_done=True)
            if is_refused(error) or (made := self._lost(part)) is None:
                raise self._refusal(error, "create") from None
        journal.note(part, batch=self._id(made, "create"))
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
        wait = FIRST_WAIT
        failures: Counter[str] = Counter()
        seen: dict[str, str] = {}
        end = time.monotonic() + LONGEST_BATCH
        while True:
            for part in parts:
                try:
                    batch = self._polled(part)
                    failures[part.name] = 0
                except Exception as error:
                    failures[part.name] += 1
                    if getattr(error, "status_code", None) == 404:
                        raise UsageError(
                            f"{self._client.server.address} has no batch {part.batch}: use the key "
                            f"that made it, or delete {journal_path(self._log.path)} to submit "
                            "its calls again."
                        ) from None
                    if failures[part.name] == GIVE_UP_AFTER or is_refused(error):
                        raise self._refusal(error, "poll") from None
                    continue
                if seen.get(part.name) != batch.status:
                    logger.info("batch %s: %s", part.batch, batch.status)
                seen[part.name] = batch.status
                if batch.status in ENDED:
                    return part, batch
            if time.monotonic() > end:
                raise UsageError(
                    f"batch {parts[0].batch} has not ended in time; the same command waits again, "
                    "and submits nothing twice; if you cancel the batch, it collects what was made."
                )
            time.sleep(wait)
            wait = min(1.5 * wait, LONGEST_POLL)

    def _polled(self, part: Part) -> Any:
        """Return the batch of a part, with a status that batches have."""
        batch = self._client.openai.batches.retrieve(part.batch)
        if getattr(batch, "status", None) not in (*ENDED, *UNDER_WAY):
            raise ValueError("no status")
        return batch

    def _collected(
        self, part: Part, batch: Any, left: dict[str, Question]
    ) -> Iterator[tuple[Question, Answer]]:
        """Yield the answers of a batch that has ended; put back what is to be asked again."""
        if not (keys := self._pending(part, left)):
            return
        longest = sum(received for _, received in part.bounds.values())
        size = LONGEST_BODY + len(part.keys) * BYTES_A_LINE + BYTES_A_TOKEN * longest
        rows: dict[str, Mapping[str, Any]] = {}
        for kind in ("error_file_id", "output_file_id"):
            if isinstance(getattr(batch, kind, None), str):
                rows |= self._rows(self._id(batch, "read", kind), size)
        is_whole = batch.status == "completed"
        for key in keys:
            question = left.pop(key)
            reply, is_learned = self._reply(question, rows.get(key), is_whole)
            answer = self._asker.answer(question, reply)
            self._account.spent += self._dollars(reply.billed) - self._dollars(part.bounds[key])
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
        if not isinstance(status, int) or not 100 <= status < 600:
            return Reply("", "broken reply"), False
        return Reply("", NOT_MADE if is_passing(status) else f"status {status}"), False

    def _learns(self, error: Any, question: Question) -> bool:
        """Return whether to repeat a call without the parameter that an error names, once."""
        sent = {"max_tokens": 0, "temperature": 0} | self._asker.request(question)
        if not (name := self._client.learn(error, sent)):
            return False
        repeated = question.key(self._judge), name
        is_first = repeated not in self._repeated
        self._repeated.add(repeated)
        return is_first

    def _id(self, found: Any, what: str, name: str = "id") -> str:
        """Return an id that the server gave.

        Raises:
            UsageError: it is none.
        """
        value = getattr(found, name, None)
        is_id = isinstance(value, str) and _ID.fullmatch(value)
        if not is_id or self._client.redacted(str(value)) != value:
            raise UsageError(
                f"{self._client.server.address} gives no {name} to --batch ({what}): it may not "
                f"have batches; {batch_remedy(what != 'upload')}."
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
        is_unpaid = what == "upload" or (what == "create" and is_refused(error))
        happened = f"answers {status}" if isinstance(status, int) else "does not answer"
        return UsageError(
            f"{self._client.server.address} {happened} to --batch ({what}): check key and quota; "
            f"{batch_remedy(not is_unpaid)}."
        )
