"""`softpref generate --base_url`: responses of a server, with the judge's guarantees."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from softpref.algorithm.ranks import Ranks
from softpref.cli import main
from softpref.errors import UsageError
from softpref.judging import client
from softpref.judging.generate import run_generate
from softpref.judging.generate_options import GenerateOptions
from softpref.judging.log import Lines
from softpref.judging.responses import load_responses
from tests.judging.server import Script, serving
from tests.judging.test_endpoint import KEY, only_the_first
from tests.progress import slowness

PROMPTS = [f"Question {i}?" for i in range(6)]


def echo(request):
    """A response that says which prompt it is to."""
    given = request.get("prompt") or request["messages"][-1]["content"]
    return f"to {given} by {request.get('seed')}"


def writing(**script):
    made = Script(**script)
    made.writes = echo
    return made


def write(path, prompts=PROMPTS):
    rows = [each if isinstance(each, dict) else {"prompt": each} for each in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def generate(script, tmp_path, *more, prompts=PROMPTS, output="out.jsonl"):
    main(["generate", "--model", "m", "--base_url", script.url, "--prompts",
          write(tmp_path / "prompts.jsonl", prompts), "--output", str(tmp_path / output),
          "--timeout_s", str(slowness()), "--max_retries", "2", *more])  # fmt: skip
    return [json.loads(line) for line in (tmp_path / output).read_text().splitlines()]


def failing(script, tmp_path, capsys, *more, **given):
    with pytest.raises(SystemExit) as end:
        generate(script, tmp_path, *more, **given)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_text_is_continued_and_responses_stand_in_the_prompts_order(tmp_path):
    with serving(writing()) as script:
        rows = generate(script, tmp_path)
    assert [row["response"] for row in rows] == [f"to {p} by None" for p in PROMPTS]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert list(load_responses(str(tmp_path / "out.jsonl"))) == [row["uid"] for row in rows]
    assert script.paths == {"/v1/completions"}
    assert {(b["model"], b["max_tokens"], b["temperature"]) for b in script.bodies} == {
        ("m", 512, 0.0)
    }
    record = json.loads((tmp_path / "out.jsonl.record.json").read_text())
    assert (record["base_url"], record["max_new_tokens"]) == (script.url, 512)
    assert "batch_size" not in record
    assert not (tmp_path / "out.jsonl.progress").exists()


def test_messages_tools_and_template_arguments_are_sent(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    context = {"tools": [{"name": "f"}], "chat_template_kwargs": {"thinking": False}}
    with serving(writing()) as script:
        (row,) = generate(script, tmp_path, prompts=[{"prompt": messages, **context}])
        generate(script, tmp_path, "--prompt_format", "chat", prompts=["Hi"], output="b.jsonl")
    assert row["response"] == "to Hi by None"
    assert row["tools"] == context["tools"]
    assert script.paths == {"/v1/chat/completions"}
    first, second = script.bodies
    assert first["messages"] == messages
    assert {name: first[name] for name in context} == context
    assert second["messages"] == [{"role": "user", "content": "Hi"}]


def test_samples_have_seeds_of_their_own(tmp_path):
    drawn = ("--temperature", "0.7", "--samples", "2", "--seed")
    with serving(writing()) as script:
        one = generate(script, tmp_path, *drawn, "1")
        again = generate(script, tmp_path, *drawn, "1", output="b.jsonl")
        other = generate(script, tmp_path, *drawn, "2", output="c.jsonl")
    assert one == again
    assert len({row["response"] for row in one + other}) == 24
    assert {body["temperature"] for body in script.bodies} == {0.7}


def test_a_server_that_knows_no_seed_gets_none(tmp_path):
    refusal = f"error {json.dumps({'param': 'seed'})}"
    with serving(writing()) as script:
        script.faults = lambda _: refusal if "seed" in script.bodies[-1] else None
        rows = generate(script, tmp_path, "--temperature", "1", "--concurrency", "1")
    assert rows[0]["response"] == "to Question 0? by None"
    assert sum("seed" in body for body in script.bodies) == 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("is_written", [False, True], ids=["before", "after"])
def test_a_kill_asks_for_no_response_twice(tmp_path, monkeypatch, is_written):
    add, count = Lines.add, []

    def dying(lines, row):
        count.append(1)
        if len(count) == 3 and not is_written:
            raise Killed
        add(lines, row)
        if len(count) == 3:
            raise Killed

    with serving(writing()) as script:
        monkeypatch.setattr(Lines, "add", dying)
        with pytest.raises(Killed):
            generate(script, tmp_path, "--concurrency", "1")
        assert not (tmp_path / "out.jsonl").exists()
        monkeypatch.setattr(Lines, "add", add)
        progress = tmp_path / "out.jsonl.progress"
        progress.write_bytes(progress.read_bytes() + b'{"sample": 0, "pro')  # a torn line
        rows = generate(script, tmp_path, "--concurrency", "3")
    assert [row["response"] for row in rows] == [f"to {p} by None" for p in PROMPTS]
    lost = 0 if is_written else 1  # in flight at the kill
    assert Counter(script.calls.values()) == ({1: 6} if not lost else {1: 5, 2: 1})


def test_other_settings_do_not_continue_it(tmp_path, capsys):
    with serving(writing(faults=only_the_first("refusal"))) as script:
        script.writes = lambda _: ""
        script.faults = only_the_first("truncated")
        failing(script, tmp_path, capsys)
        assert "was started with other settings" in failing(
            script, tmp_path, capsys, "--max_new_tokens", "9"
        )


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ("429", None), ("500", None), ("cut", None), ("truncated", "broken reply"),
        ("status 400", "status 400"), ('message {"content": 5}', "broken reply"),
        ('body {"choices": [[]]}', "broken reply"), ("body " + "[" * 10_000, "broken reply"),
        ("endless body", "broken reply"), ("slow body", "timeout"), ("hang", "timeout"),
        ('message {"content": null, "tool_calls": [{}]}', "tool call"),
    ],
)  # fmt: skip
def test_every_fault_is_repaired_or_counted_and_asked_again(
    tmp_path, capsys, monkeypatch, fault, failure
):
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.2)
    seconds = (0.3 if failure == "timeout" else 5) * slowness()
    short = ("--prompt_format", "chat", "--timeout_s", str(seconds), "--max_retries", "2")
    with serving(writing(faults=only_the_first(fault))) as script:
        if failure is None:
            assert len(generate(script, tmp_path, *short)) == 6
            return
        said = failing(script, tmp_path, capsys, *short)
        assert f"1 of 6 responses failed ({failure} 1): the same command asks for these" in said
        assert not (tmp_path / "out.jsonl").exists()
        script.faults = lambda _: None
        tries = dict(script.calls)
        patient = ("--prompt_format", "chat")
        assert all(row["response"] for row in generate(script, tmp_path, *patient))
        assert sum(script.calls.values()) - sum(tries.values()) == 1


def test_a_failed_response_is_empty_only_on_request(tmp_path, capsys):
    with serving(writing(faults=only_the_first("truncated"))) as script:
        rows = generate(script, tmp_path, "--failed_as_empty", "true")
    assert sum(row["response"] == "" for row in rows) == 1
    said = "".join(capsys.readouterr())
    assert "1 of them empty" in said
    assert "1 of 6 responses failed (broken reply 1) and are written as empty" in said
    record = json.loads((tmp_path / "out.jsonl.record.json").read_text())
    assert record["failed_as_empty"] == {"broken reply": 1}


def test_a_refusal_is_a_response_and_thoughts_without_a_word_are_none(tmp_path, capsys):
    with serving(writing(faults=lambda _: "refusal")) as script:
        rows = generate(script, tmp_path, prompts=PROMPTS[:1])
        assert rows[0]["response"] == "I cannot judge this."
        script.faults, script.thinks = lambda _: None, 1000
        said = failing(script, tmp_path, capsys, output="b.jsonl")
        assert "6 of 6 responses failed (cut off 6)" in said


def test_calls_that_all_fail_stop_it_and_the_flag_that_helps_is_named(tmp_path, capsys):
    many = [f"Question {i}?" for i in range(60)]
    with serving(writing()) as script:
        script.thinks = 1000
        said = failing(script, tmp_path, capsys, prompts=many)
        assert "20 calls in a row failed (cut off): replies do not fit into 512 tokens" in said
        assert "a larger --max_new_tokens; run" in said  # and no flag that only judges have
        script.thinks = 0
        assert len(generate(script, tmp_path, prompts=many)) == 60


def test_calls_in_flight_when_it_stops_are_written_and_counted(tmp_path, capsys):
    many = [f"Question {i}?" for i in range(60)]
    with serving(writing(latency=0.05)) as script:
        script.thinks = 1000
        failing(script, tmp_path, capsys, "--concurrency", "32", prompts=many)
        lines = (tmp_path / "out.jsonl.progress").read_text().splitlines()
        assert len(lines) - 1 == sum(script.calls.values()) > 20


HALF = json.loads(r'"\ud83d"')
"""A surrogate without the other half of its pair, which UTF-8 cannot hold."""


def test_half_a_surrogate_pair_does_not_lose_the_output(tmp_path, capsys):
    with serving(writing()) as script:
        script.writes = lambda _: f"{HALF}a \U0001f600 hello {HALF}"
        rows = generate(script, tmp_path)
        assert {row["response"] for row in rows} == {"\ufffda \U0001f600 hello \ufffd"}
        failing(script, tmp_path, capsys, *PRICED, "--max_cost", str(CALL + MOST), output="b.jsonl")
        progress = tmp_path / "b.jsonl.progress"  # as written before
        progress.write_text(progress.read_text().replace("\\ufffd", "\\ud83d"))
        assert HALF in json.loads(progress.read_text().splitlines()[-1])["text"]
        assert generate(script, tmp_path, *PRICED, output="b.jsonl") == rows


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("status 401", "answers 401: name the variable that holds the key with --api_key_env"),
        ("status 403", "answers 403: name the variable that holds the key with --api_key_env"),
        ("status 404", "check --base_url (it ends in /v1) and --model"),
        ("redirect http://localhost:1/v1", "redirects are not followed: set --base_url"),
    ],
)
def test_a_server_that_takes_no_call_ends_it(tmp_path, capsys, fault, message):
    with serving(writing(faults=lambda _: fault)) as script:
        assert message in failing(script, tmp_path, capsys)
    assert sum(script.calls.values()) <= 8


def test_the_key_comes_from_the_environment_goes_to_the_server_and_is_not_kept(
    tmp_path, monkeypatch, caplog, capsys
):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    with serving(writing()) as script:
        script.writes = lambda _: f"I was asked by {KEY}."
        generate(script, tmp_path, "--api_key_env", "SOME_KEY")
        assert script.keys == {f"Bearer {KEY}"}
        script.keys.clear()
        generate(script, tmp_path, output="b.jsonl")
        assert script.keys == {"Bearer none"}  # OpenAI's key goes to OpenAI alone
        written = "".join(p.read_text() for p in tmp_path.glob("out*"))
        assert "I was asked by [key]." in written
        assert KEY not in written + caplog.text
        said = "".join(capsys.readouterr())
        assert said.count(f"generate m: sends $SOME_KEY to {script.url}") == 1
        config = tmp_path / "config.yaml"
        config.write_text("api_key_env: SOME_KEY\n")
        assert "api_key_env is not read from a file" in failing(
            script, tmp_path, capsys, "--config", str(config), output="c.jsonl"
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "3"], "--concurrency: has no effect without --base_url"),
        (["--base_url", "http://h/v1", "--bf16", "true"], "--bf16: has no effect with --base_url"),
        (["--base_url", f"http://h/v1?key={KEY}"], "--base_url: remove user, password and query"),
        (["--base_url", "http://h/v1", "--timeout_s", "0"], "--timeout_s 0.0: must be a positive"),
        (["--base_url", "http://h/v1", "--api_key_env", KEY], "no such variable is set"),
        (["--base_url", "http://h/v1", "--samples", "2"], "greedy responses are all alike"),
        (["--base_url", "http://h/v1", "--max_cost", "1"], "--max_cost needs --price_input"),
        (["--base_url", "http://h/v1", "--max_cost", "-1"], "--max_cost"),
        (["--price_input", "1"], "--price_input: has no effect without --base_url"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["generate", "--model", "m", "--prompts", write(tmp_path / "p.jsonl"), "--output",
              str(tmp_path / "deep" / "out.jsonl"), *arguments])  # fmt: skip
    said = capsys.readouterr().err
    assert message in said
    assert KEY not in said
    assert not (tmp_path / "deep").exists()


PRICED = (
    "--price_input",
    "10",
    "--price_output",
    "30",
    "--concurrency",
    "1",
    "--max_new_tokens",
    "40",
)
CALL = (100 * 10 + 20 * 30) / 1e6
"""Dollars of a call, as the scripted server counts it."""
MOST = 3 * (11 * 10 + 40 * 30) / 1e6
"""Dollars that a call could take, with its retries: a token per byte of the prompt."""


def test_max_cost_stops_before_a_call_that_could_exceed_it_and_a_larger_one_continues(
    tmp_path, capsys
):
    with serving(writing()) as script:
        enough_for_3 = str(2 * CALL + MOST + 1e-6)
        said = failing(script, tmp_path, capsys, *PRICED, "--max_cost", enough_for_3)
        assert f"--max_cost {enough_for_3} dollars: 3 of 6 responses were not asked for" in said
        assert len(script.calls) == 3
        assert not (tmp_path / "out.jsonl").exists()
        # What earlier runs spent counts.
        failing(script, tmp_path, capsys, *PRICED, "--max_cost", enough_for_3)
        assert len(script.calls) == 3
        rows = generate(script, tmp_path, *PRICED, "--max_cost", "1")
        assert len(rows) == 6
        assert set(script.calls.values()) == {1}
    assert f"at most {6 * CALL:.2f} dollars so far" in "".join(capsys.readouterr())


def test_failed_calls_and_calls_without_a_count_cost_the_most(tmp_path, capsys):
    with serving(writing(faults=only_the_first("truncated"))) as script:
        script.usage = None
        most = str(3.5 * MOST)
        said = failing(script, tmp_path, capsys, *PRICED, "--max_cost", most)
        assert "3 of 6 responses were not asked for" in said
        calls = script.calls.total()
        failing(script, tmp_path, capsys, *PRICED, "--max_cost", most)
        assert script.calls.total() == calls


def test_a_file_from_before_there_were_prices_continues(tmp_path, capsys):
    with serving(writing()) as script:
        failing(script, tmp_path, capsys, *PRICED, "--max_cost", str(2 * CALL + MOST))
        progress = tmp_path / "out.jsonl.progress"
        head, *lines = progress.read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert all(row.pop("billed") == [100, 20] for row in rows)
        progress.write_text("".join(f"{line}\n" for line in (head, *map(json.dumps, rows))))
        assert len(generate(script, tmp_path, "--max_new_tokens", "40")) == 6
        assert set(script.calls.values()) == {1}


def test_several_processes_are_refused(tmp_path):
    options = GenerateOptions(
        model="m", prompts="p.jsonl", output=str(tmp_path / "o.jsonl"), base_url="http://x/v1"
    )
    with pytest.raises(UsageError, match="--base_url: one process asks the server, and 2 were"):
        run_generate(options, Ranks(count=2))
