"""Whatever bytes a file holds, reading it succeeds or says in one message what is wrong.

A few hundred inputs here, and as many to a reader as SOFTPREF_FUZZ says in `make test-fuzz`.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softpref.auditing.audit import AuditOptions
from softpref.auditing.marks import read_marks
from softpref.data.sources import load_pairs
from softpref.data.tokens import tokenize_pairs
from softpref.errors import UsageError
from softpref.judging.check import load_gold
from softpref.judging.log import VerdictLog, resume_from
from softpref.judging.options import JudgeOptions, judge_from_file
from softpref.judging.questions import Answer, Question
from softpref.judging.responses import load_prompts, load_responses
from softpref.options import parse
from softpref.training.checkpoints import newest_complete
from softpref.world.language import make_tokenizer

INPUTS = int(os.environ.get("SOFTPREF_FUZZ", "60"))
SECONDS = 5.0  # of processor time, that one input may take

PAIRS = [
    {"prompt": f"Was ist {i}? ☃ \u200b\u202e", "chosen": f"{i} \U0001f600", "rejected": "x",
     "is_flipped": i % 2 == 0, "uid": str(i), "soft_label": 0.5}
    for i in range(4)
]  # fmt: skip
TURN = [{"role": "user", "content": "Hi."}]
CONVERSATIONS = [
    {"prompt": TURN, "chosen": [{"role": "assistant", "content": f"a {i}"}],
     "rejected": [{"role": "assistant", "content": "b"}]}
    for i in range(3)
]  # fmt: skip
RESPONSES = [{"uid": str(i), "prompt": "p", "response": f"r{i}"} for i in range(3)]
GOLD = [{"prompt": "p", "response_1": "a", "response_2": "b", "gold": 1 + i} for i in range(2)]
MARKS = [{"uid": str(i), "mark": mark} for i, mark in enumerate(("right", "wrong", "unsure"))]
PIECES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"\xed\xa0\x80", b'"', b"'", b"{", b"[",
    b"]}", b"\n", b"\r", b"\r\n", b",", b":", b"1e999", b"-0", b"NaN", b"Infinity", b"null",
    "\u202e\u200b\ufeff".encode(), b"[" * 2000, b"9" * 5000, b"!!python/object/apply:os.system",
    b"&a *a", b"<<: *x", b"\xc0\xaf", b"PAR1", b"../../etc/passwd",
)  # fmt: skip


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def verdicts() -> bytes:
    from softpref.judging.questions import as_row

    question = Question("u", "p", "a", "b", False)
    return lines([as_row(question, answer, "j") for answer in (Answer("A"), Answer(None, "x"))])


def csv() -> bytes:
    rows = [f'"{row["prompt"]}","{row["chosen"]}",x,true' for row in PAIRS]
    return "\n".join(["prompt,chosen,rejected,is_flipped", *rows]).encode()


def read_pairs(path):
    load_pairs(str(path), on_bad_row="skip")
    load_pairs(str(path))


def read_conversations(path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    pairs = load_pairs(str(path), on_bad_row="skip").pairs
    tokenize_pairs(pairs, tokenizer, 64, name="fuzz", on_bad_row="skip")


def read_log(path):
    with VerdictLog(path):
        pass


def read_config(path):
    parse("audit", ["--config", str(path)], AuditOptions)
    parse("judge", ["--config", str(path)], JudgeOptions)


def read_checkpoint(path):
    step = path.parent / "checkpoint-3"
    step.mkdir(exist_ok=True)
    (step / "a.json").write_text("{}")
    (step / "manifest.json").write_bytes(path.read_bytes())
    newest_complete(path.parent)


def exported(tool):
    return (Path(__file__).parents[1] / "auditing" / "exports" / f"{tool}.json").read_bytes()


RECORD = {"seed": 1}
READERS = {
    "pairs.jsonl": (lines(PAIRS), read_pairs),
    "pairs.json": (json.dumps(PAIRS).encode(), read_pairs),
    "pairs.csv": (csv(), read_pairs),
    "pairs.parquet": (parquet(PAIRS), read_pairs),
    "lines.json": (lines(PAIRS), read_pairs),
    "pairs.tsv": (csv().replace(b",", b"\t"), read_pairs),
    "pairs.jsonl.gz": (gzip.compress(lines(PAIRS), mtime=0), read_pairs),
    "pairs.csv.zst": (pa.Codec("zstd").compress(csv(), asbytes=True), read_pairs),
    "conversations.jsonl": (lines(CONVERSATIONS), read_conversations),
    "prompts.jsonl": (lines(RESPONSES), lambda path: load_prompts(str(path))),
    "responses.jsonl": (lines(RESPONSES), lambda path: load_responses(str(path))),
    "gold.jsonl": (lines(GOLD), lambda path: load_gold(str(path))),
    "marks.jsonl": (lines(MARKS), lambda path: read_marks(str(path))),
    "argilla.json": (exported("argilla"), lambda path: read_marks(str(path))),
    "label_studio.json": (exported("label_studio"), lambda path: read_marks(str(path))),
    "verdicts.jsonl": (verdicts(), read_log),
    "out.progress": (lines([RECORD, ["a", "b"]]), lambda path: resume_from(path, RECORD)),
    "config.yaml": (b"judge_model: m\norders: one\nconcurrency: 3\n", read_config),
    "judge.yaml": (
        b"judge_model: m\norders: one\n", lambda path: judge_from_file(str(path), "--judge")
    ),
    "manifest": (
        b'{"format": 1, "files": {"a.json": {"size": 2, "sha256": "x"}}}', read_checkpoint
    ),
}  # fmt: skip


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Change a few bytes, or many."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        at = draw.randrange(len(changed) + 1)
        end = min(len(changed), at + draw.choice([0, 1, 3, 20]))
        match draw.randrange(6):
            case 0:
                changed[at:end] = bytes(draw.randrange(256) for _ in range(end - at or 1))
            case 1:
                changed[at:end] = draw.choice(PIECES)
            case 2:
                del changed[at:end]
            case 3:
                changed[at:at] = changed[at : at + 50]
            case 4:
                del changed[at:]
            case 5:
                if at < len(changed):
                    changed[at] ^= 1 << draw.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused_in_words(tmp_path, name):
    content, read = READERS[name]
    draw = random.Random(name)
    read_or_refused(tmp_path / "seed" / name, content, read)
    refused = 0
    for i in range(INPUTS):
        refused += read_or_refused(tmp_path / str(i % 50) / name, mutate(content, draw), read)
    assert name == "manifest" or 0 < refused <= INPUTS


def read_or_refused(path: Path, content: bytes, read) -> bool:
    """Return whether it was refused; anything else that goes wrong is an error of the test."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    start = time.process_time()
    try:
        read(path)
        return False
    except UsageError:
        return True
    except SystemExit as error:
        raise AssertionError(f"exits with {error.code} on {content!r}") from error
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error} on {content!r}") from error
    finally:
        assert time.process_time() - start < SECONDS, content


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
names = st.sampled_from(
    ["prompt", "chosen", "rejected", "uid", "is_flipped", "soft_label", "response", "gold",
     "response_1", "response_2", "mark", "key", "verdict", "failure", "messages"]
)  # fmt: skip


@settings(max_examples=INPUTS, suppress_health_check=list(HealthCheck), database=None)
@given(rows=st.lists(st.dictionaries(names, values, max_size=8) | values, max_size=4))
def test_any_json_is_read_or_refused_in_words(tmp_path_factory, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    home = tmp_path_factory.mktemp("rows")
    for name in READERS:
        if name.endswith(".jsonl"):
            read_or_refused(home / name, content, READERS[name][1])


@pytest.mark.parametrize(
    "text",
    ["\u202e right to left", "zero\u200bwidth", "\ufeffmark", "e\u0301",
     "\U0001f468\u200d\U0001f469", "x" * 1_000_000, "\u2028 line \u2029 ends \x85",
     "\x00\x01\x1f", " ", "\t\n"],
)  # fmt: skip
def test_odd_text_comes_through_as_it_is(tmp_path, text):
    row = {"prompt": f"p {text}", "chosen": f"a{text}", "rejected": f"b{text}"}
    path = tmp_path / "pairs.jsonl"
    for ensure_ascii in (True, False):
        path.write_text(json.dumps(row, ensure_ascii=ensure_ascii) + "\n", encoding="utf-8")
        pairs = load_pairs(str(path)).pairs
        assert {name: pairs[0][name] for name in row} == row
