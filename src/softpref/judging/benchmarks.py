"""Rows of AlpacaEval and Arena-Hard, read and written.

AlpacaEval (github.com/tatsu-lab/alpaca_eval, README and `evaluate` in src/alpaca_eval/main.py): a
JSON list of `instruction`, `output`, optional `input`, and `generator`, the model's name.

Arena-Hard v2.0 (github.com/lmarena/arena-hard-auto, src/arenahard/gen_answer.py): lines of `uid`,
`ans_id`, `model`, `messages`, `tstamp` and `metadata`; the last message's content is `{"answer":
text}`. Its questions have `uid` and `prompt`. v0.1 (gen_answer.py at 01109e9): questions have
`question_id` and `turns`; answers have `choices` and no prompt.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from softpref.data.messages import Text, as_text
from softpref.data.readers import RowError
from softpref.judging.questions import Comparison, plain_prompt
from softpref.training.output import write_lines, write_text

logger = logging.getLogger(__name__)

BenchmarkKind = Literal["alpaca_eval", "arena_hard"]


def from_benchmark(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """Return a row with `prompt` and, if answered, `response`, and the benchmark it is of, if any.

    Raises:
        RowError: it is an Arena-Hard v0.1 answer, which has no prompt, or has several turns.
    """
    if row.get("prompt") is not None:
        return row, None
    if isinstance(row.get("instruction"), str):
        given = (row["instruction"], row.get("input"))
        prompt = "\n\n".join(part for part in given if part and isinstance(part, str))
        own = row.get("response")  # beside it, `output` is often the data set's answer
        response = row.get("output") if own is None else own
        return {**row, "prompt": prompt, "response": response}, "AlpacaEval"
    if "choices" in row and "question_id" in row:
        raise RowError(
            "is an Arena-Hard v0.1 answer, which has no prompt; join it with question.jsonl by "
            "question_id, into rows of prompt and response"
        )
    if "question_id" in row and isinstance(row.get("turns"), list):
        turns = [turn.get("content") for turn in row["turns"] if isinstance(turn, Mapping)]
        if len(turns) != 1:
            raise RowError(f"is an Arena-Hard v0.1 question of {len(turns)} turns, not one")
        return {**row, "prompt": turns[0]}, "Arena-Hard v0.1"
    messages = row.get("messages")
    if "uid" in row and "model" in row and isinstance(messages, list) and messages:
        content = messages[-1].get("content") if isinstance(messages[-1], Mapping) else None
        answer = content.get("answer") if isinstance(content, Mapping) else content
        return {**row, "prompt": _plain(messages[:-1]), "response": answer}, "Arena-Hard"
    return row, None


def _plain(messages: Sequence[Any]) -> Any:
    """Return messages, or the content of a single user turn."""
    only = messages[0] if len(messages) == 1 else None
    if isinstance(only, Mapping) and only.get("role") == "user":
        return only.get("content")
    return list(messages)


def benchmark_file(kind: BenchmarkKind, name: str) -> str:
    """Return the name of the file with a model's responses."""
    return f"{name.replace('/', '_')}.{'json' if kind == 'alpaca_eval' else 'jsonl'}"


def write_for_benchmark(
    kind: BenchmarkKind,
    directory: Path,
    names: tuple[str, str],
    comparisons: Sequence[Comparison],
    uids: Mapping[str, str],
) -> None:
    """Write the responses and the baseline's in a benchmark's form, one file for each.

    Args:
        kind: the benchmark.
        directory: where to, as `benchmark_file` names them.
        names: of the method and of the baseline.
        comparisons: of one contest.
        uids: Arena-Hard's uid of each comparison, by its own uid, where known.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, side in zip(names, ("response", "baseline"), strict=True):
        rows = [(each, getattr(each, side)) for each in comparisons]
        file = directory / benchmark_file(kind, name)
        if kind == "alpaca_eval":
            outputs = [
                {
                    "instruction": as_text(plain_prompt(each.prompt)),
                    "output": as_text(text),
                    "generator": name,
                }
                for each, text in rows
            ]
            write_text(file, json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
        else:
            answers = (
                _answer(name, each, text, uids.get(each.uid, each.uid)) for each, text in rows
            )
            write_lines(file, answers)
    flat = sum(not isinstance(plain_prompt(each.prompt), str) for each in comparisons)
    if kind == "alpaca_eval" and flat:
        logger.info(
            f"--export_to {kind}, {names[0]}: {flat:,} of {len(comparisons):,} prompts are "
            "conversations, and each is written as one text with its roles"
        )


def _answer(name: str, comparison: Comparison, text: Text, uid: str) -> dict[str, Any]:
    prompt = comparison.prompt
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    reply = {"role": "assistant", "content": {"answer": as_text(text)}}
    return {"uid": uid, "ans_id": f"{name}-{uid}", "model": name, "messages": [*asked, reply]}
