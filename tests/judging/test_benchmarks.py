"""AlpacaEval's and Arena-Hard's files: read as responses and prompts, and written."""

from __future__ import annotations

import json
import logging

import pytest

from softpref.errors import UsageError
from softpref.judging import responses
from softpref.judging.compare import CompareOptions, _contests, _export, named_runs
from softpref.judging.responses import join, load_prompts, load_responses

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3", "generator": "m"}
ARENA = {
    "uid": "u1", "ans_id": "x", "model": "m",
    "messages": [
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": {"answer": "4"}},
    ],
    "tstamp": 1.0, "metadata": {"token_len": 1},
}  # fmt: skip


def write(path, rows):
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return str(path)


def test_files_of_both_are_read_as_responses_to_the_same_prompt(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    ours = write(tmp_path / "ours.json", [ALPACA])
    theirs = write(tmp_path / "theirs.jsonl", [ARENA])
    (found,) = join(ours, theirs)
    assert (found.prompt, found.response, found.baseline) == ("Add.\n\n1 2", "3", "4")
    assert "row 1: read as a row of AlpacaEval" in caplog.text
    assert "line 1: read as a row of Arena-Hard" in caplog.text


@pytest.mark.parametrize("output", [{"output": "gold"}, {}])
def test_a_response_of_its_own_is_kept_beside_an_instruction(tmp_path, output):
    row = {"instruction": "Q", "input": "", "response": "ours"} | output
    (found,) = load_responses(write(tmp_path / "a.jsonl", [row])).values()
    assert (found[0].prompt, found[1]) == ("Q", "ours")


def test_a_text_and_one_user_s_message_of_it_are_the_same_prompt(tmp_path):
    asked = [{"role": "user", "content": "Q"}]
    texts = [{"prompt": "Q", "response": "1"}, {"prompt": "Q", "response": "2"}]
    messages = [{"prompt": asked, "response": "3"}, {"prompt": "Q", "response": "4"}]
    ours, theirs = (
        write(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("ours", texts), ("theirs", messages))
    )
    assert [(c.prompt, c.response, c.baseline) for c in join(ours, theirs)] == [
        ("Q", "1", "3"), ("Q", "2", "4"),
    ]  # fmt: skip
    assert [(c.prompt, c.response) for c in join(theirs, ours)] == [(asked, "3"), ("Q", "4")]
    other = write(tmp_path / "other.jsonl", [{"prompt": asked, "tools": [{}], "response": "5"}])
    with pytest.raises(UsageError, match="its prompt has fewer answers"):
        join(ours, other)


def test_a_system_message_stays_in_the_prompt(tmp_path):
    row = ARENA | {"messages": [{"role": "system", "content": "s"}, *ARENA["messages"]]}
    ((given, response),) = load_responses(write(tmp_path / "a.jsonl", [row])).values()
    assert [turn["role"] for turn in given.prompt] == ["system", "user"]
    assert response == "4"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "output": "", "dataset": "d"},
        {"uid": "u", "category": "hard_prompt", "prompt": "Q"},
        {"question_id": "q", "category": "a", "turns": [{"content": "Q"}]},
    ],
)
def test_questions_are_prompts(tmp_path, row):
    assert [given.prompt for given in load_prompts(write(tmp_path / "q.jsonl", [row]))] == ["Q"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": "q", "choices": []}, "line 1: is an Arena-Hard v0.1 answer, which has no"),
        ({"question_id": "q", "turns": [{}, {}]}, "line 1: is an Arena-Hard v0.1 question of 2"),
        ({"question_id": "q", "turns": [{}]}, "line 1: prompt is missing"),
        ({"instruction": "Q"}, "line 1: has no text under `response`"),
        ({"uid": "u", "model": "m", "messages": ["x"]}, "line 1: prompt is empty"),
        (ARENA | {"messages": ["x", {"content": {}}]}, "neither text nor a list of messages"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, row, message):
    with pytest.raises(UsageError, match=message):
        load_responses(write(tmp_path / "a.jsonl", [row]))


def export(kind, output, given, baseline):
    runs = named_runs(given)
    contests = _contests(runs, baseline, head_to_head=False)
    _export(CompareOptions(baseline=baseline, output=str(output), export_to=kind), runs, contests)


@pytest.mark.parametrize("kind", ["alpaca_eval", "arena_hard"])
def test_what_is_written_is_read_again(tmp_path, kind):
    baseline = write(tmp_path / "m.jsonl", [ARENA])
    ours = write(tmp_path / "ours.jsonl", [{"prompt": "Add.\n\n1 2", "response": "3"}])
    output = tmp_path / "out"
    export(kind, output, [f"m={ours}"], baseline)
    ending = "json" if kind == "alpaca_eval" else "jsonl"
    files = {name: output / kind / f"{name}.{ending}" for name in ("m", "baseline")}
    again = join(str(files["m"]), str(files["baseline"]))
    assert again == join(ours, baseline)
    text = files["m"].read_text()
    rows = json.loads(text) if kind == "alpaca_eval" else [json.loads(text)]
    if kind == "alpaca_eval":
        assert rows == [{"instruction": "Add.\n\n1 2", "output": "3", "generator": "m"}]
    else:
        assert (rows[0]["uid"], rows[0]["model"]) == ("u1", "m")
        assert rows[0]["messages"][-1]["content"] == {"answer": "3"}


def test_a_user_s_message_is_an_instruction_and_a_conversation_is_flattened(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    prompts = [
        [{"role": "user", "content": "user: hello"}],
        [{"role": "user", "content": parts}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        [{"role": "user", "content": "hi", "name": "N"}],
        [{"role": "system", "content": "s"}],
    ]
    rows = [{"prompt": prompt, "response": "r"} for prompt in prompts]
    ours, theirs = (write(tmp_path / f"{name}.jsonl", rows) for name in ("m", "base"))
    export("alpaca_eval", tmp_path / "out", [ours], theirs)
    written = json.loads((tmp_path / "out" / "alpaca_eval" / "m.json").read_text())
    assert [row["instruction"] for row in written] == [
        "user: hello", "a\nb", "system: s\n\nuser: u", 'user: hi\n{"name": "N"}', "system: s",
    ]  # fmt: skip
    assert "m: 3 of 5 prompts are conversations" in caplog.text


def answers(path, response):
    path.parent.mkdir(exist_ok=True)
    return write(path, [{"prompt": "Q", "response": response}])


def test_no_exported_file_overwrites_another(tmp_path):
    ours = answers(tmp_path / "a" / "baseline.jsonl", "ours")
    theirs = answers(tmp_path / "b" / "baseline.jsonl", "theirs")
    export("alpaca_eval", tmp_path / "out", [ours], theirs)
    written = {
        path.name: [(row["generator"], row["output"]) for row in json.loads(path.read_text())]
        for path in (tmp_path / "out" / "alpaca_eval").iterdir()
    }
    assert written == {
        "baseline.json": [("baseline", "ours")], "baseline_2.json": [("baseline_2", "theirs")],
    }  # fmt: skip


def test_two_methods_of_one_exported_file_are_refused(tmp_path):
    files = [answers(tmp_path / f"{name}.jsonl", name) for name in ("one", "two", "base")]
    with pytest.raises(UsageError, match=r"a/b and a_b would both be written to a_b\.jsonl"):
        export("arena_hard", tmp_path / "out", [f"a/b={files[0]}", f"a_b={files[1]}"], files[2])
    assert not (tmp_path / "out").exists()


def test_the_baseline_is_read_once_for_its_uids(tmp_path, monkeypatch):
    files = [answers(tmp_path / f"{name}.jsonl", name) for name in ("one", "two", "base")]
    contests = _contests(runs := named_runs(files[:2]), files[2], head_to_head=False)
    read = []

    def noted(source):
        read.append(source)
        return load_responses(source)

    monkeypatch.setattr(responses, "load_responses", noted)
    options = CompareOptions(
        baseline=files[2], output=str(tmp_path / "out"), export_to="arena_hard"
    )
    _export(options, runs, contests)
    assert sorted(read) == sorted(files)
