"""A judge behind an endpoint: what it is sent, and every way in which it can fail."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress

import pytest

from softpref.errors import UsageError
from softpref.judging import client
from softpref.judging.ask import ask_judge, make_judge
from softpref.judging.failures import GIVE_UP_AFTER
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions, check_judge, judge_from_file
from softpref.judging.questions import Comparison, judge_hash
from tests.judging.server import FAULTS, Script, always_first, serving, some_faults
from tests.progress import finished, slowness, wait_for

KEY = "sk-very-secret"


def comparisons(count):
    return [
        Comparison(str(i), f"Question {i}?", "good " * (i % 3) + f"r{i}", "good " * (i % 2) + "b")
        for i in range(count)
    ]


def options(script, **given):
    usual = dict(judge_model="scripted", base_url=script.url, timeout_s=slowness(), max_retries=3)
    return JudgeOptions(**usual | given)


def judged(script, tmp_path, count, **given):
    asked = options(script, **given)
    check_judge(asked)
    with VerdictLog(tmp_path / "verdicts.jsonl") as log:
        return ask_judge(comparisons(count), make_judge(asked), asked, log)


def test_verdicts_are_the_judges_in_both_orders(tmp_path):
    with serving(Script()) as script:
        found = judged(script, tmp_path, 12)
    for i, outcome in enumerate(found.outcomes):
        by = i % 3 - i % 2
        assert outcome.result == ("win" if by > 0 else "loss" if by < 0 else "tie")
        assert not outcome.flipped
    assert found.calls == sum(script.calls.values()) == 24
    assert (found.input_tokens, found.output_tokens, found.dollars) == (2400, 480, None)
    assert found.first_share == 0.5


def test_a_judge_that_always_says_a_decides_nothing(tmp_path):
    with serving(Script(always_first)) as script:
        found = judged(script, tmp_path, 10)
        assert {outcome.result for outcome in found.outcomes} == {"tie"}
        assert all(outcome.flipped for outcome in found.outcomes)
        assert found.first_share == 1
        one = judged(script, tmp_path, 40, orders="one")
    wins = sum(outcome.result == "win" for outcome in one.outcomes)
    assert 8 < wins < 32


def test_nothing_is_asked_twice(tmp_path):
    with serving(Script()) as script:
        judged(script, tmp_path, 5)
        assert sum(script.calls.values()) == 10
        judged(script, tmp_path, 8)
        assert sum(script.calls.values()) == 16
        judged(script, tmp_path, 8, orders="one")
        assert sum(script.calls.values()) == 16
        judged(script, tmp_path, 8, judge_model="another")
        assert sum(script.calls.values()) == 32


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ("429", None), ("500", None), ("cut", None), ("truncated", "broken reply"),
        ("prose", "no verdict"), ("refusal", "refusal"),
    ],
)  # fmt: skip
def test_every_fault_is_mended_or_counted(tmp_path, fault, failure):
    with serving(Script(faults=lambda _: fault)) as script:
        found = judged(script, tmp_path, 3)
        assert found.failures == ({failure: 6} if failure else {})
        assert {o.result for o in found.outcomes} == ({"failed"} if failure else {"win", "tie"})
        tries = max(script.calls.values())
        assert tries == (1 if failure else 3)
        again = judged(script, tmp_path, 3)
        assert again == found
        assert max(script.calls.values()) == tries  # a failure is an answer, too
        script.faults = lambda _: None
        mended = judged(script, tmp_path, 3, retry_failed=True)
        assert mended.failures == {}


def test_a_call_that_hangs_is_given_up(tmp_path):
    with serving(Script(faults=lambda _: "hang")) as script:
        found = judged(script, tmp_path, 1, timeout_s=0.3 * slowness(), max_retries=1)
    assert found.failures == {"timeout": 2}
    assert set(script.calls.values()) == {2}


def completion(**changed):
    message = {"role": "assistant", "content": '{"justification": "x", "verdict": "A"}'}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m",
            "choices": choices} | changed  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000 + "]" * 100_000, '{"choices": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"choices": [{"message": {"content": ' + '{"a":' * 5_000 + "1" + "}" * 5_000 + "}}]}",
        json.dumps(completion(choices="text")), json.dumps(completion(choices={"0": 1})),
        json.dumps(completion(choices=[[]])), json.dumps(completion(choices=[None])),
        "null", '"text"', "1" * 5_000, "NaN", " " * 2_000_000 + json.dumps(completion()), "\x00",
        "<html>",
    ],
    ids=range(14),
)  # fmt: skip
def test_a_body_of_any_shape_is_one_counted_failure(tmp_path, body):
    with serving(Script(faults=lambda _: f"body {body}")) as script:
        found = judged(script, tmp_path, 1)
        assert list(found.failures.values()) == [2]
        script.faults = lambda _: None
        assert judged(script, tmp_path, 3).failures == found.failures  # the run goes on


@pytest.mark.parametrize("number", ["1" + "0" * 308, "1" + "0" * 400, "1e999", "-1", "true", "[]"])
def test_a_count_of_tokens_that_is_none_ends_nothing(tmp_path, number):
    usage = f'{{"prompt_tokens": {number}, "completion_tokens": {number}}}'
    body = json.dumps(completion(usage=0)).replace('"usage": 0', f'"usage": {usage}')
    prices = dict(price_input=1.0, price_output=1.0)
    with serving(Script(faults=lambda _: f"body {body}")) as script:
        found = judged(script, tmp_path, 2, **prices)
    assert found.failures == {}
    is_counted = number == "true"  # it is 1
    assert found.dollars == (pytest.approx(8e-6) if is_counted else None)


def only_the_first(fault):
    """The fault for the question that is asked first, and for no other."""
    asked = []

    def faults(digest):
        asked.append(digest)
        return fault if digest == asked[0] else None

    return faults


@pytest.mark.parametrize("param", [["max_tokens"], {"a": 1}, 1, None, "temperatures"])
def test_an_error_of_any_shape_is_one_counted_failure(tmp_path, param):
    error = json.dumps({"message": ["no"], "param": param, "code": {}})
    with serving(Script(faults=only_the_first(f"error {error}"))) as script:
        assert judged(script, tmp_path, 3, concurrency=1).failures == {"status 400": 1}


@pytest.mark.parametrize(
    ("fault", "failure"),
    [("endless body", "broken reply"), ("slow body", "timeout"), ("endless head", "timeout")],
)
def test_a_reply_without_end_is_given_up(tmp_path, monkeypatch, fault, failure):
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.2)
    with serving(Script(faults=only_the_first(fault))) as script:
        # The other calls are made beside it, by a worker in the place of the one that hangs.
        found = judged(script, tmp_path, 2, timeout_s=0.3 * slowness(), max_retries=0,
                       concurrency=1)  # fmt: skip
        assert found.failures == {failure: 1}
        assert found.calls == 4
        assert script.sent < 100_000_000


@pytest.mark.parametrize("where", ["http://localhost:1/v1", "/v1/elsewhere"])
def test_redirects_are_not_followed(tmp_path, where):
    with (
        serving(Script(faults=lambda _: f"redirect {where}")) as script,
        pytest.raises(UsageError, match=r"answers 307: .* set --base_url to where it leads"),
    ):
        judged(script, tmp_path, 2)
    assert sum(script.calls.values()) <= 4


def test_no_more_calls_are_in_flight_than_allowed(tmp_path):
    with serving(Script(latency=0.02)) as script:
        judged(script, tmp_path, 40, concurrency=5)
    assert script.most_in_flight == 5


def test_faults_by_hash_leave_one_answer_each(tmp_path):
    with serving(Script(faults=some_faults)) as script:
        found = judged(script, tmp_path, 100, concurrency=32)
    digests = Counter(some_faults(digest) for digest in script.calls)
    assert len(digests) == len(FAULTS) + 1
    assert found.failures == {
        "broken reply": digests["truncated"],
        "no verdict": digests["prose"],
        "timeout": digests["hang"],
        "refusal": digests["refusal"],
    }
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 200


def only_third(status):
    """The status, for one question in three."""
    return lambda digest: f"status {status}" if digest % 3 == 0 else None


@pytest.mark.parametrize("status", [400, 403, 404, 422, 503])
def test_a_status_that_some_questions_meet_is_counted(tmp_path, status):
    with serving(Script(faults=lambda digest: None)) as script:
        judged(script, tmp_path, 1)  # so the endpoint is known to take calls
        script.faults = only_third(status)
        found = judged(script, tmp_path, 20, max_retries=0, concurrency=2)
    assert set(found.failures) == {f"status {status}"}
    assert 3 < found.failures[f"status {status}"] < 30


MALFORMED = [
    '{"role": "assistant", "content": 5}', '{"role": "assistant", "content": {"a": 1}}',
    '{"role": "assistant"}', '"A"', "[]", "null", '{"content": [5]}',
]  # fmt: skip


@pytest.mark.parametrize("message", MALFORMED)
def test_a_malformed_reply_is_a_failure(tmp_path, message):
    with serving(Script(faults=lambda _: f"message {message}")) as script:
        found = judged(script, tmp_path, 2)
        assert set(found.failures) <= {"broken reply", "no verdict"}
        assert sum(found.failures.values()) == 4
        assert judged(script, tmp_path, 2) == found


def test_a_reply_in_parts_is_read(tmp_path):
    parts = [{"type": "text", "text": '{"verdict": "tie"}'}]
    message = json.dumps({"role": "assistant", "content": parts})
    with serving(Script(faults=lambda _: f"message {message}")) as script:
        assert judged(script, tmp_path, 2).failures == {}


@pytest.mark.parametrize("usage", ["x", [1], {"prompt_tokens": -1, "completion_tokens": 2}, None,
                                   {"prompt_tokens": 1.5, "completion_tokens": 1}])  # fmt: skip
def test_a_strange_count_of_tokens_is_no_count_and_is_charged_for(tmp_path, usage, caplog):
    prices = dict(price_input=10.0, price_output=20.0, max_reply_tokens=20, max_retries=0)
    with serving(Script()) as script:
        script.usage = usage
        found = judged(script, tmp_path, 3, max_cost=10.0, **prices)
        assert (found.failures, found.input_tokens, found.dollars) == ({}, 0, None)
        said = "the endpoint counts no tokens in 6 of 6 answers, so the cost is not known"
        assert said in caplog.text
        with pytest.raises(UsageError, match="--max_cost"):
            judged(script, tmp_path, 50, max_cost=0.1, **prices)
        assert sum(script.calls.values()) < 12


def test_a_model_that_wants_another_name_for_the_longest_reply_gets_it(tmp_path):
    with serving(Script(faults=lambda _: "wants max_completion_tokens")) as script:
        assert judged(script, tmp_path, 3).failures == {}


def test_what_is_asked_again_counts_for_the_limit(tmp_path):
    prices = dict(price_input=10.0, price_output=20.0, max_reply_tokens=20, max_retries=0)
    with serving(Script(faults=lambda _: "refusal")) as script:
        judged(script, tmp_path, 5, max_cost=1.0, **prices)
        for _ in range(20):
            with suppress(UsageError):
                judged(script, tmp_path, 5, max_cost=0.06, retry_failed=True, **prices)
        with pytest.raises(UsageError, match="calls were not made"):
            judged(script, tmp_path, 5, max_cost=0.06, retry_failed=True, **prices)
        assert sum(script.calls.values()) * 0.0014 <= 0.06


def test_a_quota_that_runs_out_ends_the_run_and_what_failed_is_asked_again(tmp_path):
    with serving(Script()) as script:
        judged(script, tmp_path, 5)
        script.faults = lambda _: "status 429"
        with pytest.raises(UsageError, match="20 calls in a row failed"):
            judged(script, tmp_path, 60, max_retries=0)
        script.faults = lambda _: None
        found = judged(script, tmp_path, 60)
    assert found.failures == {}


@pytest.mark.parametrize(
    ("form", "remedy"),
    [("schema", "try --structured_output words"), ("words", "use a server that holds replies")],
)
def test_a_model_that_gives_no_verdict_ends_the_run(tmp_path, form, remedy):
    message = f"20 calls in a row failed .no verdict.: {remedy}"
    with (
        serving(Script(faults=lambda _: "prose")) as script,
        pytest.raises(UsageError, match=message),
    ):
        judged(script, tmp_path, 60, structured_output=form)


def test_calls_in_flight_when_it_stops_are_logged_and_counted(tmp_path):
    prices = dict(price_input=10.0, price_output=20.0, max_cost=100.0)
    with serving(Script(faults=lambda _: "prose", latency=0.05)) as script:
        for _ in range(3):
            with pytest.raises(UsageError, match="20 calls in a row failed"):
                judged(script, tmp_path, 60, concurrency=32, max_retries=0, **prices)
            rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").open()]
            assert sum(row["input_tokens"] > 0 for row in rows) == sum(script.calls.values())
        assert sum(script.calls.values()) > 100
        script.faults = lambda _: None
        assert judged(script, tmp_path, 60, **prices).failures == {}


def test_nobody_there_is_said_however_few_the_calls(tmp_path):
    with serving(Script()) as script:
        url = script.url
    with pytest.raises(UsageError, match=r"4 calls in a row failed \(no connection\)"):
        judged(script, tmp_path, 2, base_url=url, max_retries=0)


def test_an_interrupted_command_does_not_wait_for_calls_that_hang(tmp_path):
    code = (
        "import signal, sys; from softpref.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
        f"main(['judge', '--check', {str(tmp_path / 'gold.jsonl')!r}, '--judge_model', 'm', "
        "'--base_url', sys.argv[1], '--output', sys.argv[2], '--timeout_s', '9999'])"
    )
    row = {"prompt": "p", "response_1": "a", "response_2": "b", "gold": 1}
    (tmp_path / "gold.jsonl").write_text(json.dumps(row) + "\n")
    with serving(Script(latency=9999)) as script:
        process = subprocess.Popen(
            [sys.executable, "-c", code, script.url, str(tmp_path / "out")],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for(lambda: script.calls, process)
        process.send_signal(signal.SIGINT)
        code, said = finished(process)
    assert code == 130
    assert "run the same command to resume" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "set SOME_KEY to a valid"), (403, "SOME_KEY may not use this"), (404, "--base_url"),
     (422, "--structured_output words")],
)  # fmt: skip
def test_an_endpoint_that_takes_no_call_ends_it(tmp_path, monkeypatch, status, remedy):
    monkeypatch.setenv("SOME_KEY", KEY)
    with (
        serving(Script(faults=lambda _: f"status {status}")) as script,
        pytest.raises(UsageError, match=remedy),
    ):
        judged(script, tmp_path, 50, api_key_env="SOME_KEY")


def test_a_status_that_every_call_meets_ends_it_early(tmp_path):
    with (
        serving(Script(faults=lambda _: "status 400")) as script,
        pytest.raises(UsageError, match=f"{GIVE_UP_AFTER} calls in a row failed"),
    ):
        judged(script, tmp_path, 500)
    assert sum(script.calls.values()) < 100


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(tmp_path, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("SOME_KEY", KEY)
    with serving(Script()) as script:
        judged(script, tmp_path, 3, api_key_env="SOME_KEY")
        assert script.keys == {f"Bearer {KEY}"}
        assert KEY not in caplog.text
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written + caplog.text


def test_a_key_that_is_sent_back_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    said = json.dumps({"justification": f"I was asked by {KEY}, none else.", "verdict": "A"})
    message = json.dumps({"role": "assistant", "content": said})
    with serving(Script(faults=lambda _: f"message {message}")) as script:
        judged(script, tmp_path, 2, api_key_env="SOME_KEY")
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written
    assert "I was asked by [key], none else." in written


def test_a_key_in_the_place_of_its_variable_is_not_repeated():
    with pytest.raises(UsageError, match="--api_key_env: no such variable is set") as refused:
        make_judge(JudgeOptions(judge_model="m", api_key_env=KEY))
    assert KEY not in str(refused.value)


def test_where_a_key_goes_is_said_before_the_first_call(monkeypatch, caplog):
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level("INFO", "softpref")
    make_judge(JudgeOptions(judge_model="m", base_url="http://host:1/v1", api_key_env="SOME_KEY"))
    make_judge(JudgeOptions(judge_model="gpt"))
    make_judge(JudgeOptions(judge_model="n", base_url="http://host:1/v1"))
    assert [record.getMessage() for record in caplog.records] == [
        "judge m: sends $SOME_KEY to http://host:1/v1",
        "judge gpt: sends $OPENAI_API_KEY to https://api.openai.com/v1",
    ]


def test_a_judge_s_file_sends_a_key_only_where_a_flag_says(tmp_path):
    path = tmp_path / "judge.yaml"
    path.write_text("judge_model: m\nbase_url: http://host/v1\n")
    assert judge_from_file(str(path), "--judge").api_key_env is None
    found = judge_from_file(str(path), "--judge", "SOME_KEY=http://host/v1")
    assert (found.api_key_env, found.base_url) == ("SOME_KEY", "http://host/v1")
    with pytest.raises(UsageError, match="--judge_key: --judge .* has another address"):
        judge_from_file(str(path), "--judge", "SOME_KEY=http://other/v1")
    with pytest.raises(UsageError, match="--judge_key: give NAME=ADDRESS") as refused:
        judge_from_file(str(path), "--judge", KEY)
    assert KEY not in str(refused.value)
    path.write_text("judge_model: m\napi_key_env: AWS_SECRET\n")
    with pytest.raises(UsageError, match="--judge .* api_key_env is not read from a file"):
        judge_from_file(str(path), "--judge")


def test_the_key_of_openai_goes_to_openai_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(Script()) as script:
        judged(script, tmp_path, 1)
        assert script.keys == {"Bearer none"}


@pytest.mark.parametrize("key", ["sk-\u00e9", "a\nb"])
def test_a_key_that_is_none_is_named(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match="OPENAI_API_KEY is not a key"):
        make_judge(JudgeOptions(judge_model="m"))
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    make_judge(JudgeOptions(judge_model="m"))


@pytest.mark.parametrize(
    "url",
    [f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}", f"ftp://user:{KEY}@host",
     f"localhost:8000/v1?key={KEY}", "http://host:80a/v1", "http://[::1/v1", "http://host:99999/v1"],
)  # fmt: skip
def test_an_address_with_a_secret_or_none_is_refused_without_being_repeated(url):
    with pytest.raises(UsageError, match="--base_url") as refused:
        check_judge(JudgeOptions(judge_model="m", base_url=url))
    assert KEY not in str(refused.value)


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    message = "OPENAI_API_KEY is not set: .* --api_key_env; .* --base_url"
    with pytest.raises(UsageError, match=message):
        make_judge(JudgeOptions(judge_model="gpt-4o"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'softpref[judge]'")):
        make_judge(JudgeOptions(judge_model="m", base_url="http://localhost:1/v1"))


def test_the_account_never_goes_above_its_limit(tmp_path):
    # 100 and 20 tokens a call at these prices are 0.0014 dollars; the worst case is dearer.
    prices = dict(price_input=10.0, price_output=20.0, max_reply_tokens=20, max_retries=0)
    with serving(Script()) as script:
        for limit in (0.05, 0.1):
            with pytest.raises(UsageError, match=r"--max_cost .* calls were not made"):
                judged(script, tmp_path, 100, max_cost=limit, **prices)
            calls = sum(script.calls.values())
            assert limit - 0.02 < calls * 0.0014 <= limit
        found = judged(script, tmp_path, 100, max_cost=10.0, **prices)
    assert found.dollars == pytest.approx(200 * 0.0014)
    assert sum(script.calls.values()) == 200


def test_who_the_judge_is_depends_on_what_changes_its_answers(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def name(**given):
        return judge_hash(make_judge(JudgeOptions(**{"judge_model": "m"} | given)))

    assert name() == name(concurrency=3, timeout_s=5.0, max_retries=1, orders="one")
    changed = [dict(judge_model="n"), dict(structured_output="words"), dict(max_reply_tokens=5),
               dict(base_url="http://localhost/v1")]  # fmt: skip
    assert len({name(), *(name(**given) for given in changed)}) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--judge_model is missing"),
        ({"judge_model": "m", "concurrency": 0}, "--concurrency 0"),
        ({"judge_model": "m", "timeout_s": 0.0}, "--timeout_s 0.0"),
        ({"judge_model": "m", "timeout_s": float("inf")}, "--timeout_s inf"),
        ({"judge_model": "m", "max_cost": 1.0}, "--max_cost needs --price_input"),
        ({"judge_model": "m", "price_input": -1.0}, "--price_input -1.0"),
        ({"judge": "checker", "judge_model": "m"}, "--judge_model: --judge checker does not read"),
        ({"judge": "reward_model", "judge_model": "m", "orders": "one"}, "--orders"),
        ({"judge": "implicit_reward", "judge_model": "m"}, "--judge_reference is missing"),
        ({"judge_model": "m", "orders": "Both"}, "--orders Both: choose one of both, one"),
        ({"judge_model": "m", "grades": "4"}, "--grades 4: choose one of three, five"),
        ({"judge": "judge", "judge_model": "m"}, "--judge judge: choose one of endpoint, "),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(UsageError, match=message):
        check_judge(JudgeOptions(**given))
