"""`softpref judge` as its users run it: killed, resumed, and on wrong input."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from softpref.cli import main
from softpref.errors import UsageError
from softpref.judging.check import load_gold
from softpref.judging.questions import Comparison
from tests.forked import Forked
from tests.judging.server import Script, always_first, honest, serving, some_faults
from tests.progress import wait_for

PAIRS = 500
TIMEOUT_S = 3.0
"""Seconds within which a busy machine too answers what is not held back on purpose."""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Responses of which a third is better, a third as good, a third worse."""
    prompts = [f"Question {i}?" for i in range(PAIRS)]
    ours = [{"prompt": p, "response": f"good answer {i}"} for i, p in enumerate(prompts)]
    theirs = [{"prompt": p, "response": "good " * (i % 3) + "reply"} for i, p in enumerate(prompts)]
    return write(tmp_path / "ours.jsonl", ours), write(tmp_path / "theirs.jsonl", theirs)


def arguments(files, output, script):
    return ["judge", "--responses", files[0], "--baseline", files[1], "--output", str(output),
            "--judge_model", "scripted", "--base_url", script.url, "--timeout_s", str(TIMEOUT_S),
            "--max_retries", "3", "--concurrency", "32"]  # fmt: skip


def log_of(output):
    return [json.loads(line) for line in (output / "verdicts.jsonl").read_bytes().splitlines()]


def run_and_kill(command, log, lines):
    """Start the command and kill it when the log has so many lines."""
    process = Forked("softpref.cli", *command)
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= lines, process, every=0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_thousand_judgements_survive_two_kills_and_faults(files, tmp_path):
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    with serving(Script(faults=some_faults)) as script:
        for lines in (200, 600):
            run_and_kill(arguments(files, disturbed, script), disturbed / "verdicts.jsonl", lines)
        asked_by_then = len(log_of(disturbed))
        main(arguments(files, disturbed, script))
        faults = Counter(some_faults(digest) for digest in script.calls)
    assert 600 <= asked_by_then < 2 * PAIRS
    with serving(Script(faults=some_faults)) as script:
        main(arguments(files, undisturbed, script))
    rows = log_of(disturbed)
    assert len(rows) == len({row["key"] for row in rows}) == 2 * PAIRS
    assert all((row["verdict"] is None) != (row["failure"] is None) for row in rows)
    assert 0.25 < sum(count for fault, count in faults.items() if fault) / (2 * PAIRS) < 0.35
    records = [json.loads((d / "judge.json").read_text()) for d in (disturbed, undisturbed)]
    assert records[0]["found"] == records[1]["found"]
    assert records[0]["account"] == records[1]["account"]
    assert (disturbed / "outcomes.jsonl").read_bytes() == (
        undisturbed / "outcomes.jsonl"
    ).read_bytes()
    found = records[0]["found"]
    assert found["asked"] == PAIRS
    assert found["wins"] + found["losses"] + found["ties"] + found["failed"] == PAIRS
    # Of what did not fail, thirds by construction: the answers differ by one "good" or none.
    results = Counter(
        (i % 3, json.loads(line)["result"])
        for i, line in enumerate((disturbed / "outcomes.jsonl").read_text().splitlines())
    )
    assert {kind for kind in results if kind[1] != "failed"} == {
        (0, "win"), (1, "tie"), (2, "loss")
    }  # fmt: skip


def check(script, tmp_path, one_in):
    """Measure a judge on 40 pairs, of which the scripted one is wrong about one in some."""
    rows = [
        {"prompt": f"Q{i}", "response_1": "good", "response_2": "bad",
         "gold": 1 if i % one_in else 2}
        for i in range(40)
    ]  # fmt: skip
    main(["judge", "--check", write(tmp_path / "gold.jsonl", rows), "--judge_model", "m",
          "--base_url", script.url, "--output", str(tmp_path / "out")])  # fmt: skip
    return json.loads((tmp_path / "out" / "judge.json").read_text())["found"]


@pytest.mark.parametrize(("judge", "one_in"), [(honest, 3), (always_first, 4)])
def test_a_judge_no_better_than_chance_is_unfit(tmp_path, capsys, judge, one_in):
    """26 of 40 right has a lower end below a half."""
    with serving(Script(judge)) as script:
        check(script, tmp_path, one_in)
    assert "**unfit**: on these pairs the judge is not shown to be" in capsys.readouterr().out


def test_a_judge_is_measured_on_known_pairs(tmp_path, capsys):
    with serving(Script()) as script:
        found = check(script, tmp_path, 4)
    assert (found["accuracy"], found["right"], found["first_share"]) == (0.75, 0.75, 0.5)
    assert found["flipped"] == found["failed"] == 0
    said = capsys.readouterr().out
    assert "right in 75.0% of what it decided" in said
    assert "unfit" not in said


PAIR = {"prompt": "p", "response": "r"}


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (
            [PAIR],
            [{"prompt": "q", "response": "r"}],
            "ours.jsonl, line 1: its prompt has fewer answers in",
        ),
        ([PAIR], [PAIR, PAIR], "theirs.jsonl, line 2: its prompt has fewer answers in"),
        ([{"prompt": "p"}], [PAIR], "ours.jsonl, line 1: has no text under `response`"),
        ([{"response": "r"}], [PAIR], "ours.jsonl, line 1: prompt is missing"),
        ([{"prompt": [{"role": "user"}], "response": "r"}], [PAIR], "a message without content"),
        ([], [PAIR], "ours.jsonl: contains no rows"),
        ([5], [PAIR], "line 1: not an object"),
    ],
)
def test_wrong_files_are_named_and_nothing_is_written(tmp_path, capsys, ours, theirs, message):
    files = write(tmp_path / "ours.jsonl", ours), write(tmp_path / "theirs.jsonl", theirs)
    with serving(Script()) as script, pytest.raises(SystemExit) as end:
        main(arguments(files, tmp_path / "out", script))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}


def test_known_pairs_bring_messages_tools_and_what_else_a_template_reads(tmp_path):
    """As `gold` names the better response, and as pairs of preference data."""
    context = {"tools": [{"name": "f"}], "chat_template_kwargs": {"thinking": True}}
    prompt = [{"role": "user", "content": "Q", "name": "kim"}]
    said = {"role": "assistant", "content": "bad"}
    gold = {"prompt": prompt, **context, "response_1": "bad", "response_2": [CALL], "gold": 2}
    pair = {"prompt": prompt, **context, "chosen": [CALL], "rejected": [said]}
    for row in (gold, pair, pair | {"prompt": json.dumps(prompt)}):
        (found,) = load_gold(write(tmp_path / "gold.jsonl", [row]))
        assert found == Comparison("1", prompt, [CALL], "bad", context)

    asked = []
    with serving(Script(lambda _, user: asked.append(user) or "A")) as script:
        main(["judge", "--check", str(tmp_path / "gold.jsonl"), "--judge_model", "m", "--base_url",
              script.url, "--output", str(tmp_path / "out")])  # fmt: skip
    assert len(asked) == 2
    for text in ('tools: [{"name": "f"}]', 'user: Q\n{"name": "kim"}', '"tool_calls": [{"name'):
        assert all(text in user for user in asked)


def test_pairs_that_were_flipped_are_swapped_back(tmp_path, caplog):
    caplog.set_level("INFO", "softpref")
    pairs = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    tie = {"prompt": "tie", "chosen": "x", "rejected": "y", "label": "tie"}
    clean = write(tmp_path / "clean.jsonl", [*pairs, tie])
    noisy = str(tmp_path / "noisy.jsonl")
    main(["inject", "--input", clean, "--output", noisy, "--rate", "0.4"])
    assert load_gold(noisy) == load_gold(clean)
    flipped = sum(json.loads(line)["is_flipped"] for line in Path(noisy).read_text().splitlines())
    assert f"noisy.jsonl: {flipped} pairs with is_flipped are swapped back" in caplog.text
    assert flipped > 5


def test_every_bad_known_pair_is_named_with_a_remedy_that_there_is(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "gold.jsonl", [good, good | {"chosen": "b"}])
    with pytest.raises(UsageError, match=r"line 2: chosen and rejected are identical. Fix or rem"):
        load_gold(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "response_1": "a", "response_2": "b", "gold": 3}, "gold (1, 2 or tie)"),
        ({"prompt": "p", "response_1": "a", "gold": 1}, "response_2 is missing; fix"),
        ({"prompt": "p", "response_1": "a", "response_2": "", "gold": 1}, "response_2 is empty"),
        ({"prompt": "p", "response_1": 5, "response_2": "b", "gold": 1}, "neither text nor a list"),
        ({"prompt": "p", "response_1": [CALL], "response_2": "b", "gold": 1}, "both as messages"),
        (
            {"prompt": "p", "tools": "no", "response_1": "a", "response_2": "b", "gold": 1},
            "line 1: tools is text, but not JSON",
        ),
        ({"prompt": "p", "chosen": "", "rejected": "x"}, "line 1: chosen is empty"),
    ],
)
def test_wrong_known_pairs_are_named(tmp_path, capsys, row, message):
    with pytest.raises(SystemExit):
        main(["judge", "--check", write(tmp_path / "gold.jsonl", [row]), "--judge", "checker",
              "--output", str(tmp_path / "out")])  # fmt: skip
    assert message in capsys.readouterr().err


def test_check_and_responses_exclude_each_other(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["judge", "--check", "x", "--responses", "y", "--judge", "checker", "--output", "z"])
    assert "remove --responses and --baseline" in capsys.readouterr().err
