"""Judging in batches: at half the price, whatever is killed, lost or expired, and never twice."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from softpref.errors import UsageError
from softpref.judging import batch, client, endpoint
from softpref.judging.journal import Journal, journal_path
from softpref.judging.log import Lines
from tests.judging.server import MARK, Script, serving
from tests.judging.test_endpoint import KEY, judged
from tests.progress import slowness

PRICES = dict(price_input=100.0, price_output=100.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(batch, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(endpoint, "SAMPLE_CALLS", 2)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.1)


def in_batch(script, tmp_path, count=4, **given):
    return judged(script, tmp_path, count, **dict(batch=True, max_retries=0) | PRICES | given)


def test_a_batch_says_what_single_calls_say_for_half(tmp_path, caplog):
    caplog.set_level("INFO", "softpref")
    with serving(Script()) as script:
        script.batches.polls = 3
        found = in_batch(script, tmp_path / "batch")
        alone = judged(script, tmp_path / "alone", 4, **PRICES)
    assert found.outcomes == alone.outcomes
    assert set(script.calls.values()) == {2}
    assert len(script.batches.made) == 1
    assert alone.dollars == pytest.approx(8 * 0.012)
    assert found.dollars == pytest.approx(2 * 0.012 + 6 * 0.006)  # two were asked at once
    assert "batch batch_0: in" in caplog.text or "batch batch_0: validating" in caplog.text
    marks = [MARK.search(body["messages"][0]["content"])[0] for body in script.bodies]
    assert len(set(marks)) == 16  # the fence is new in every call


def test_the_price_is_halved_in_what_is_said_before(tmp_path, caplog):
    caplog.set_level("INFO", "softpref")
    with serving(Script()) as script:
        in_batch(script, tmp_path, 30)
        in_batch(script, tmp_path, 50)
    assert "40 more calls take" in caplog.text
    assert "0.24 ± 0.00 dollars, up to 24 hours per batch" in caplog.text


class Killed(BaseException):
    pass


@pytest.mark.parametrize("is_written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(9))
def test_a_kill_at_any_step_pays_nothing_twice(tmp_path, monkeypatch, step, is_written):
    """Steps are the lines of log and journal: two answers, part, file, batch, answers, the end."""
    add, steps = Lines.add, iter(range(100))

    def dying(lines, row):
        at = next(steps)
        if at == step and not is_written:
            raise Killed
        add(lines, row)
        if at == step:
            raise Killed

    asked = dict(orders="one", concurrency=1)
    with serving(Script()) as script:
        monkeypatch.setattr(Lines, "add", dying)
        with pytest.raises(Killed):
            in_batch(script, tmp_path, 5, **asked)
        monkeypatch.setattr(Lines, "add", add)
        single = sum(script.calls.values())
        found = in_batch(script, tmp_path, 5, **asked)
        alone = judged(script, tmp_path / "alone", 5, **asked | PRICES)
    assert found.outcomes == alone.outcomes
    # Two lines are of single calls: the one in flight at the kill is not known to have come.
    lost = step < 2 and not is_written
    assert Counter(script.calls.values()) == ({2: 4, 3: 1} if lost else {2: 5})
    assert single <= 5
    assert found.calls == 5
    rows = [json.loads(row) for row in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 5


def test_a_batch_whose_creation_got_no_answer_is_found(tmp_path):
    with serving(Script()) as script:
        script.batches.faults = lambda number: "lost"
        assert in_batch(script, tmp_path).failures == {}
    assert len(script.batches.made) == 1
    assert set(script.calls.values()) == {1}


def test_what_a_batch_did_not_make_is_submitted_by_the_next_command(tmp_path):
    with serving(Script()) as script:
        script.batches.faults = lambda number: "expired" if number == 0 else None
        with pytest.raises(UsageError, match="3 of 8 calls expired in their batch"):
            in_batch(script, tmp_path)
        assert sum(script.calls.values()) == 5
        found = in_batch(script, tmp_path)
    assert found.failures == {}
    assert set(script.calls.values()) == {1}
    assert found.dollars == pytest.approx(2 * 0.012 + 6 * 0.006)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("failed", r"batch batch_0 failed \(token_limit_exceeded\) and cost nothing"),
        ("refused", r"answers 400 to --batch \(create\): check key and quota, or run without"),
    ],
)
def test_a_batch_that_is_not_taken_is_named_and_can_be_repeated(tmp_path, fault, message):
    with serving(Script()) as script:
        script.batches.faults = lambda number: fault
        with pytest.raises(UsageError, match=message):
            in_batch(script, tmp_path)
        assert sum(script.calls.values()) == 2
        script.batches.faults = lambda number: None
        assert in_batch(script, tmp_path).failures == {}
    assert set(script.calls.values()) == {1}


MALFORMED = ['{"role": "assistant", "content": 5}', '"A"', "null", '{"content": [5]}']


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ("prose", "no verdict"), ("refusal", "refusal"), ("missing", "broken reply"),
        ("status 400", "status 400"), ("status 500", "status 500"),
        *[(f"message {each}", "broken reply") for each in MALFORMED],
    ],
)  # fmt: skip
def test_every_fault_of_a_call_in_a_batch_is_counted(tmp_path, fault, failure):
    with serving(Script()) as script:
        judged(script, tmp_path, 1, **PRICES)
        script.faults = lambda _: fault
        found = in_batch(script, tmp_path)
        assert found.failures == {failure: 6}
        assert in_batch(script, tmp_path) == found  # a failure is an answer, too
        script.faults = lambda _: None
        assert in_batch(script, tmp_path, retry_failed=True).failures == {}


def test_a_result_file_that_is_cut_is_counted_and_charged_for(tmp_path):
    with serving(Script()) as script:
        judged(script, tmp_path, 1, **PRICES)
        script.longest_file = 500
        found = in_batch(script, tmp_path)
        assert found.failures == {"broken reply": 5}
        with pytest.raises(UsageError, match="calls were not made"):
            in_batch(script, tmp_path, 5, max_cost=0.5)  # what was not counted may have been paid


def test_a_reply_that_is_cut_off_is_asked_for_in_a_second_batch(tmp_path):
    with serving(Script()) as script:
        script.thinks = 5000
        found = in_batch(script, tmp_path)
        assert found.failures == {}
        assert len(script.batches.made) == 2
        assert set(script.calls.values()) == {2}
        assert found.output_tokens == 8 * (4096 + 5020)


def test_a_batch_learns_the_other_name_of_the_limit(tmp_path):
    """An earlier run has answers, so no single call shows it."""
    with serving(Script()) as script:
        judged(script, tmp_path, 1, **PRICES)
        script.faults = lambda _: "wants max_completion_tokens"
        assert in_batch(script, tmp_path).failures == {}
        assert len(script.batches.made) == 2


def test_batches_keep_to_the_limit_of_dollars(tmp_path):
    prices = dict(price_input=0.0, price_output=100.0, max_reply_tokens=100)  # 0.01, or 0.005
    with serving(Script()) as script:
        script.usage = {"prompt_tokens": 1, "completion_tokens": 100}
        with pytest.raises(UsageError, match="--max_cost 0.035 dollars: 3 of 8 calls were not"):
            in_batch(script, tmp_path, max_cost=0.035, **prices)
        assert [len(script.batches.files[name].splitlines()) for name in ("file-0",)] == [3]
        assert in_batch(script, tmp_path, max_cost=1.0, **prices).failures == {}
    assert set(script.calls.values()) == {1}


def test_a_large_set_goes_in_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MOST_CALLS", 4)
    with serving(Script()) as script:
        assert in_batch(script, tmp_path, 6).failures == {}
    assert len(script.batches.made) == 3
    assert set(script.calls.values()) == {1}


def test_the_key_goes_to_the_server_alone_and_is_not_kept(tmp_path, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("SOME_KEY", KEY)
    said = json.dumps({"justification": f"I was asked by {KEY}, none else.", "verdict": "A"})
    with serving(Script()) as script:
        script.writes = lambda _: said
        in_batch(script, tmp_path, api_key_env="SOME_KEY")
        assert script.keys == {f"Bearer {KEY}"}
        assert KEY not in b"".join(script.batches.files[f"file-{0}"].splitlines()).decode()
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written + caplog.text
    assert written.count("I was asked by [key], none else.") == 8
    assert f"sends $SOME_KEY to {script.url}" in caplog.text


@pytest.mark.parametrize("name", ["../../v1/files", KEY, "", "x" * 300])
def test_an_id_that_is_none_is_not_used(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SOME_KEY", KEY)
    with serving(Script()) as script:
        script.batches.post = lambda *_: ({"id": name, "object": "file"}, 200)
        with pytest.raises(UsageError, match="gives no id for a batch") as end:
            in_batch(script, tmp_path, api_key_env="SOME_KEY")
    assert KEY not in str(end.value)
    assert KEY not in (tmp_path / "verdicts.jsonl.batches").read_text()


def test_each_log_has_a_journal_of_its_own(tmp_path):
    """The logs of a study's cells share a directory, and several are asked at once."""
    other = Journal(journal_path(tmp_path / "other.verdicts.jsonl"))
    with serving(Script()) as script:
        assert in_batch(script, tmp_path, 1).failures == {}
    other.close()


@pytest.mark.parametrize("line", ["{", "[]", "null", '{"part": "a"}', '{"part": 1, "keys": 5}'])
def test_a_damaged_journal_is_named(tmp_path, line):
    with serving(Script()) as script:
        judged(script, tmp_path, 1, **PRICES)
        (tmp_path / "verdicts.jsonl.batches").write_text(f"{line}\n")
        with pytest.raises(UsageError, match="verdicts.jsonl.batches, line 1: not a step of a batch"):
            in_batch(script, tmp_path)


def test_a_first_answer_without_a_verdict_sends_no_batched_call_again(tmp_path, monkeypatch):
    """The log then knows no verdict of this judge, but the journal knows the batch."""
    with serving(Script()) as script:
        script.faults = lambda _: "refusal"
        monkeypatch.setattr(batch.Batches, "_first_ended", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            in_batch(script, tmp_path)
        monkeypatch.undo()
        monkeypatch.setattr(batch, "FIRST_WAIT", 0.001)
        assert in_batch(script, tmp_path).failures == {"refusal": 8}
    assert set(script.calls.values()) == {1}


def test_a_longer_reply_without_room_is_cut_off_in_a_batch_too(tmp_path):
    with serving(Script()) as script:
        judged(script, tmp_path, 1, **PRICES)
        script.thinks = 5000
        script.faults = lambda digest: "status 400" if script.calls[digest] else None
        assert in_batch(script, tmp_path).failures == {"cut off": 6}


REQUESTS = {"upload": "POST /v1/files", "create": "POST /v1/batches", "poll": "GET /v1/batches/",
            "read": "GET /v1/files/"}  # fmt: skip


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize(
    "fault", ["redirect http://localhost:1/v1", "endless body", "slow body", "body null"]
)
def test_a_request_about_a_batch_can_fail_in_any_way(tmp_path, monkeypatch, what, fault):
    """It ends the run in time; the same command continues, and pays nothing twice."""
    monkeypatch.setattr(batch, "GIVE_UP_AFTER", 2)
    with serving(Script()) as script:
        judged(script, tmp_path, 1, **PRICES)
        script.batches.path_faults = lambda path: fault if path.startswith(REQUESTS[what]) else None
        given = dict(timeout_s=0.2 * slowness())
        if what == "read" and fault in ("endless body", "body null"):  # a file without lines
            assert in_batch(script, tmp_path, **given).failures == {"broken reply": 6}
            given["retry_failed"] = True
            script.calls.clear()
        else:
            with pytest.raises(UsageError, match="run without --batch"):
                in_batch(script, tmp_path, **given)
        assert script.sent < 100_000_000
        script.batches.path_faults = lambda path: None
        assert in_batch(script, tmp_path, **given | dict(timeout_s=9.0)).failures == {}
    assert set(script.calls.values()) == {1}


LINE = b'{"custom_id": "KEY", "error": null, "response": '


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"null", b"[]", b"[" * 100_000, b"\xff", b'{"custom_id": 5}', LINE + b"5}",
        LINE + b'{"status_code": "x"}}', LINE + b'{"status_code": 200}}',
        LINE + b'{"status_code": 200, "body": 5}}',
        LINE + b'{"status_code": 200, "body": ' + b"[" * 900 + b"]" * 900 + b"}}",
        LINE + b'{"status_code": 200, "body": {"choices": [{"message": {"content": [5]}}]}}}',
        LINE + b'{"status_code": 400, "body": {"error": {"param": ["a"], "message": 5}}}}',
    ],
    ids=range(13),
)  # fmt: skip
def test_a_line_of_any_shape_is_one_counted_failure(tmp_path, line):
    with serving(Script()) as script:
        judged(script, tmp_path, 1, **PRICES)
        script.batches.result = line
        found = in_batch(script, tmp_path)
        assert list(found.failures.values()) == [6]
        assert in_batch(script, tmp_path) == found
    assert set(script.calls.values()) == {1}


def test_a_batch_that_never_ends_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "LONGEST_BATCH", 0.1)
    with serving(Script()) as script:
        script.batches.polls = 10**9
        with pytest.raises(UsageError, match="batch batch_0 has not ended in time; the same comm"):
            in_batch(script, tmp_path)
        script.batches.made["batch_0"]["left"] = 0
        assert in_batch(script, tmp_path).failures == {}
    assert set(script.calls.values()) == {1}
