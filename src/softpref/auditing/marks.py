"""Reviewers' verdicts: the report's `marks.jsonl`, or an export of Argilla or Label Studio.

A row's keys say which of them it is from.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from softpref.auditing.review_tools import ANSWERS, QUESTION, SIDES, UNSURE
from softpref.data.bad_rows import place
from softpref.data.readers import read_rows
from softpref.errors import UsageError

logger = logging.getLogger(__name__)

MARKS = {"right": 1.0, "wrong": 0.0, "unsure": None}
Mark = float | None
_NOT_COMPLETED = (
    "their records are not completed: drafts, discarded answers, or fewer answers than the "
    "dataset asks for"
)
_SKIPPED = "the annotator skipped the task, or submitted no choice"


def read_marks(path: str, labels: Mapping[str, str] | None = None) -> dict[str, Mark]:
    """Return the reviewers' verdict on each marked pair by uid: 1 right, 0 wrong, None unsure.

    The file is `marks.jsonl` of the report, with `uid` and `mark`, or an export in JSON of what
    `audit --export_to` wrote. Of several verdicts on a pair the most frequent counts; a tie is
    unsure. An unsure pair keeps the audit's probability.

    A mark of the report says which label it is about. Where that was corrected since, right is
    wrong and wrong is right, so that marks do not undo what was done by them.

    Args:
        path: the file.
        labels: `label_key` of the pairs as they are now, by uid.

    Raises:
        UsageError: there is no such file, or a row is none of these.
    """
    votes: dict[str, Counter[Mark]] = {}
    unread: Counter[str] = Counter()
    turned = 0
    for number, row in read_rows(path):
        uid, marks = _verdicts(row, place(path, number), unread)
        if _is_about_the_other(row, (labels or {}).get(uid)):
            turned += 1
            marks = [None if mark is None else 1.0 - mark for mark in marks]
        for mark in marks:
            votes.setdefault(uid, Counter())[mark] += 1
    if turned:
        logger.warning(
            f"--marks {path}: {turned} marks are about labels that were corrected since: they are "
            "read as marks of the present labels"
        )
    for why, count in (+unread).items():
        logger.warning(f"--marks {path}: {count} answers are not read: {why}")
    differing = [of_pair for of_pair in votes.values() if len(of_pair) > 1]
    if differing:
        left = sum(_majority(of_pair) is None for of_pair in differing)
        logger.warning(
            f"--marks {path}: reviewers differ on {len(differing)} pairs: the most frequent "
            f"verdict counts; {left} of these are tied or unsure, and left to the audit"
        )
    return {uid: _majority(of_pair) for uid, of_pair in votes.items()}


def _is_about_the_other(row: object, label: str | None) -> bool:
    """Return whether a mark is about the opposite of a pair's present label."""
    about = row.get("label") if isinstance(row, dict) and "mark" in row else None
    if not isinstance(about, str) or label is None or about == label:
        return False
    return about[:-1] == label[:-1]


def _majority(votes: Counter[Mark]) -> Mark:
    (mark, most), *others = votes.most_common()
    return None if others and others[0][1] == most else mark


def _verdicts(row: object, where: str, unread: Counter[str]) -> tuple[str, list[Mark]]:
    """Return a row's uid and the verdicts in it."""
    keys = row.keys() if isinstance(row, dict) else set()
    known: Any = row
    try:
        if {"uid", "mark"} <= keys:
            return str(known["uid"]), [_mark(known["mark"], where)]
        if {"fields", "metadata", "responses"} <= keys:
            about, answers = known["metadata"], _argilla_answers(known, unread)
        elif {"data", "annotations"} <= keys:
            about, answers = known["data"], _label_studio_answers(known, unread)
        else:
            raise UsageError(
                f"{where}: no `uid` and `mark`; give the marks.jsonl that the report exports, or "
                "the JSON export of Argilla (dataset.records.to_json) or Label Studio (JSON)."
            )
        uid, labelled = about["uid"], about["labelled"]
        if not isinstance(uid, str) or labelled not in SIDES:
            raise KeyError("labelled")
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UsageError(
            f"{where}: not a pair that `audit --export_to` wrote: its uid, which response is "
            "labelled chosen, or its answers are missing; give the tool's JSON export unchanged."
        ) from None
    return uid, [_compared(answer, labelled, where) for answer in answers]


def _argilla_answers(record: dict[str, Any], unread: Counter[str]) -> list[Any]:
    given = (record["responses"] or {}).get(QUESTION) or []
    answers = [response["value"] for response in given]
    if record.get("status", "completed") == "completed":
        return answers
    unread[_NOT_COMPLETED] += len(answers)
    return []


def _label_studio_answers(task: dict[str, Any], unread: Counter[str]) -> list[Any]:
    answers = []
    for annotation in task["annotations"]:
        chosen = [
            region["value"]["choices"][0]
            for region in annotation["result"]
            if region.get("from_name") == QUESTION and not annotation.get("was_cancelled")
        ]
        answers += chosen
        unread[_SKIPPED] += not chosen
    return answers


def _mark(mark: object, where: str) -> Mark:
    if not isinstance(mark, str) or mark not in MARKS:
        raise UsageError(f"{where}: mark {mark!r}; it must be one of {', '.join(MARKS)}.")
    return MARKS[mark]


def _compared(answer: object, labelled: str, where: str) -> Mark:
    """Return the verdict on a label, from which response a reviewer finds better."""
    if not isinstance(answer, str) or answer not in ANSWERS:
        raise UsageError(f"{where}: answer {answer!r}; it must be one of {', '.join(ANSWERS)}.")
    return None if answer == UNSURE else float(answer == labelled)
