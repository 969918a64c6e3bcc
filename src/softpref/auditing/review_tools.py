"""Audited pairs as files that Argilla and Label Studio import: `audit --export_to`.

Reviewers see the responses as A and B in drawn order, and not which is labelled chosen. Which one
is, `labelled` holds: metadata in Argilla, task data in Label Studio. `marks` reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from softpref.auditing.pair_rows import worse_first
from softpref.auditing.summary import Summary
from softpref.data.messages import as_text
from softpref.data.readers import column, dataset_rows
from softpref.data.writers import write_rows
from softpref.training.output import write_text

REVIEW_FILES: dict[str, tuple[str, str]] = {
    "argilla": ("argilla_settings.json", "argilla_records.json"),
    "label_studio": ("label_studio_config.xml", "label_studio_tasks.json"),
}
"""The set-up of a project, and its pairs, by tool."""
QUESTION = "better"
UNSURE = "unsure"
SIDES = ("response_a", "response_b")
ANSWERS = dict(zip((*SIDES, UNSURE), ("A is better", "B is better", "Unsure"), strict=True))
_TITLE = "Which response is better?"
_SHOWN = {"prompt": "Prompt", "response_a": "Response A", "response_b": "Response B"}
_METADATA = {"uid": "terms", "labelled": "terms", "p_correct": "float", "evidence": "float",
             "rank": "integer"}  # fmt: skip
_VISIBLE = ("uid", "rank")
"""Metadata that annotators see; the rest would sway them."""


def write_for_review(
    home: Path, tool: str, rows: Dataset, pairs: Dataset, summary: Summary, fingerprint: str
) -> None:
    """Write all audited pairs, most suspect first, and the set-up of a project for them.

    Where evidence distinguishes right labels from wrong ones, each pair has a suggestion with its
    probability.

    Args:
        home: the directory.
        tool: one of `REVIEW_FILES`.
        rows: an audit's rows.
        pairs: the same pairs with `prompt`, `chosen` and `rejected`, in the same order.
        summary: the audit's `Summary`.
        fingerprint: of the data, for `worse_first`.
    """
    settings, records = REVIEW_FILES[tool]
    agent = f"softpref {version('softpref')}" if summary.evidence_speaks else None
    items = _items(rows, pairs, fingerprint)
    if tool == "argilla":
        write_text(home / settings, json.dumps(_argilla_settings(), indent=1) + "\n")
        entries = (_argilla_record(*item, agent) for item in items)
    else:
        write_text(home / settings, _label_studio_config())
        entries = (_label_studio_task(*item, agent) for item in items)
    write_rows(home / records, entries, records, None)


def _items(
    rows: Dataset, pairs: Dataset, fingerprint: str
) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield what reviewers see and what is known about a pair, pair by pair, by rank."""
    order = column(rows, "rank").to_numpy().argsort()
    selected = (dataset_rows(dataset.select(order)) for dataset in (rows, pairs))
    for row, texts in zip(*selected, strict=True):
        labelled, other = SIDES[::-1] if worse_first(fingerprint, row["uid"]) else SIDES
        shown = {
            "prompt": as_text(texts["prompt"]),
            labelled: as_text(texts["chosen"]),
            other: as_text(texts["rejected"]),
        }
        known = {
            "uid": row["uid"],
            "labelled": labelled,
            "p_correct": round(row["p_correct"], 4),
            "evidence": round(sum(row["evidence"].values()), 3),
            "rank": row["rank"],
        }
        yield {name: shown[name] for name in _SHOWN}, known


def _suggestion(known: dict[str, Any]) -> tuple[str, float]:
    """Return the response that is probably better, and how probably."""
    labelled, p_correct = known["labelled"], known["p_correct"]
    if p_correct >= 0.5:
        return labelled, p_correct
    return SIDES[labelled == SIDES[0]], round(1 - p_correct, 4)


def _argilla_record(
    shown: dict[str, str], known: dict[str, Any], agent: str | None
) -> dict[str, Any]:
    value, score = _suggestion(known)
    suggestion = {"value": value, "score": score, "agent": agent}
    return {
        "id": known["uid"],
        "fields": shown,
        "metadata": known,
        "suggestions": {QUESTION: suggestion} if agent else {},
        "responses": {},
        "vectors": {},
    }


def _argilla_settings() -> dict[str, Any]:
    options = [{"value": value, "text": text} for value, text in ANSWERS.items()]
    question = {"type": "label_selection", "options": options, "visible_options": len(options)}
    return {
        "guidelines": f"{_TITLE} Judge the responses, not their order or length.",
        "fields": [
            {"name": name, "title": title, "required": True, "settings": {"type": "text"}}
            for name, title in _SHOWN.items()
        ],
        "questions": [{"name": QUESTION, "title": _TITLE, "required": True, "settings": question}],
        "metadata": [
            {
                "name": name,
                "title": name,
                "settings": {"type": kind},
                "visible_for_annotators": name in _VISIBLE,
            }
            for name, kind in _METADATA.items()
        ],
        "vectors": [],
        "allow_extra_metadata": False,
    }


def _label_studio_task(
    shown: dict[str, str], known: dict[str, Any], agent: str | None
) -> dict[str, Any]:
    value, score = _suggestion(known)
    region = {
        "from_name": QUESTION,
        "to_name": "prompt",
        "type": "choices",
        "value": {"choices": [value]},
    }
    prediction = {"model_version": agent, "score": score, "result": [region]}
    return {"data": shown | known, "predictions": [prediction] if agent else []}


def _label_studio_config() -> str:
    texts = "\n".join(
        f'  <Header value="{title}" size="5"/>\n'
        f'  <Text name="{name}" value="${name}" valueType="text"/>'
        for name, title in _SHOWN.items()
    )
    choices = "\n".join(
        f'    <Choice alias="{value}" value="{text}" hotkey="{hotkey}"/>'
        for (value, text), hotkey in zip(ANSWERS.items(), "abu", strict=True)
    )
    return f"""<View>
{texts}
  <Header value="{_TITLE}" size="4"/>
  <Choices name="{QUESTION}" toName="prompt" choice="single" required="true" showInline="true">
{choices}
  </Choices>
</View>
"""
