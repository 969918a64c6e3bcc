"""Judging in batches: at half the price, whatever is killed, lost or expired, and never twice."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from softpref.errors import UsageError
from softpref.judging import batch, client, endpoint
from softpref.judging.ask import ask_judge, make_judge
from softpref.judging.journal import Journal, journal_path
from softpref.judging.log import Lines, VerdictLog
from tests.judging.server import MARK, Script, serving
from tests.judging.test_endpoint import KEY, comparisons, judged, options
from tests.progress import slowness

PRICES = dict(price_input=100.0, price_output=100.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(batch, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(endpoint, "SAMPLE_CALLS", 2)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.1)


@pytest.fixture
def no_sample(monkeypatch):
    """All calls go in batches."""
    monkeypatch.setattr(endpoint.Endpoint, "sample_size", lambda _: 0)


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
        with pytest.raises(UsageError, match="3 of 8 calls were not made by their batch"):
            in_batch(script, tmp_path)
        assert sum(script.calls.values()) == 5
        found = in_batch(script, tmp_path)
    assert found.failures == {}
    assert set(script.calls.values()) == {1}
    assert found.dollars == pytest.approx(3 * 0.012 + 5 * 0.006)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("failed", r"batch batch_0 failed \(token_limit_exceeded\) and cost nothing"),
        (
            "refused",
            r"answers 400 to --batch \(create\): check key and quota; run the same .* or without",
        ),
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


@pytest.mark.usefixtures("no_sample")
@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ("prose", "no verdict"), ("refusal", "refusal"), ("missing", "broken reply"),
        ("status 400", "status 400"),
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


@pytest.mark.usefixtures("no_sample")
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


@pytest.mark.usefixtures("no_sample")
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
        with pytest.raises(
            UsageError, match="gives no id to --batch .upload.: .* or without --batch"
        ) as end:
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
        with pytest.raises(
            UsageError, match="verdicts.jsonl.batches, line 1: not a step of a batch"
        ):
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


@pytest.mark.usefixtures("no_sample")
def test_a_longer_reply_without_room_is_cut_off_in_a_batch_too(tmp_path):
    with serving(Script()) as script:
        judged(script, tmp_path, 1, **PRICES)
        script.thinks = 5000
        script.faults = lambda digest: "status 400" if script.calls[digest] else None
        assert in_batch(script, tmp_path).failures == {"cut off": 6}


REQUESTS = {"upload": "POST /v1/files", "create": "POST /v1/batches", "poll": "GET /v1/batches/",
            "read": "GET /v1/files/"}  # fmt: skip


@pytest.mark.usefixtures("no_sample")
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
            remedy = "or without --batch" if what == "upload" else "the same command continues"
            with pytest.raises(UsageError, match=remedy):
                in_batch(script, tmp_path, **given)
        assert script.sent < 100_000_000
        script.batches.path_faults = lambda path: None
        assert in_batch(script, tmp_path, **given | dict(timeout_s=9.0)).failures == {}
    assert set(script.calls.values()) == {1}


LINE = b'{"custom_id": "KEY", "error": null, "response": '


@pytest.mark.usefixtures("no_sample")
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


@pytest.mark.usefixtures("no_sample")
def test_a_batch_that_refuses_two_parameters_is_repeated_without_both(tmp_path):
    with serving(Script()) as script:
        judged(script, tmp_path, 1, **PRICES)
        script.refuses = ["max_tokens", "temperature"]
        assert in_batch(script, tmp_path).failures == {}
    assert len(script.batches.made) == 3


def test_each_process_asks_one_question_before_its_first_batch(tmp_path):
    """It learns all refused parameters, so that no batch fails for them."""
    with serving(Script()) as script:
        judged(script, tmp_path, 1, **PRICES)
        script.refuses = ["max_tokens", "temperature"]
        found = in_batch(script, tmp_path)
    assert found.failures == {}
    assert len(script.batches.made) == 1
    assert found.dollars == pytest.approx(3 * 0.012 + 5 * 0.006)


def stopped(script, tmp_path, monkeypatch, **given):
    """Submit a batch, and end before it is collected."""
    with monkeypatch.context() as patch:
        patch.setattr(batch.Batches, "_first_ended", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            in_batch(script, tmp_path, **given)


def test_without_the_flag_what_a_batch_asks_is_not_paid_again(tmp_path, monkeypatch):
    with serving(Script()) as script:
        stopped(script, tmp_path, monkeypatch)
        with pytest.raises(UsageError, match="batch batch_0 asks 6 of .* keep --batch true, or"):
            judged(script, tmp_path, 4, **PRICES)
        assert in_batch(script, tmp_path).failures == {}
        assert judged(script, tmp_path, 4, **PRICES).calls == 8
    assert set(script.calls.values()) == {1}


@pytest.mark.usefixtures("no_sample")
@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_passing_fault_of_a_call_in_a_batch_is_submitted_again(tmp_path, status):
    with serving(Script()) as script:
        script.faults = lambda _: f"status {status}"
        with pytest.raises(UsageError, match="8 of 8 calls were not made .* cost nothing"):
            in_batch(script, tmp_path)
        script.faults = lambda _: None
        found = in_batch(script, tmp_path)
    assert found.failures == {}
    assert found.dollars == pytest.approx(8 * 0.006)


@pytest.mark.usefixtures("no_sample")
def test_a_cut_off_reply_is_not_paid_again_after_its_longer_one_expired(tmp_path):
    with serving(Script()) as script:
        script.thinks = 5000
        script.batches.faults = lambda number: "expired" if number == 1 else None
        with pytest.raises(UsageError, match="were not made by their batch"):
            in_batch(script, tmp_path)
        found = in_batch(script, tmp_path)
    assert found.failures == {}
    assert set(script.calls.values()) == {2}
    assert found.output_tokens == 8 * (4096 + 5020)


@pytest.mark.usefixtures("no_sample")
def test_what_stops_calls_of_an_expired_batch_is_the_limit_where_it_is(tmp_path):
    with serving(Script()) as script:
        script.batches.faults = lambda number: "expired"
        with pytest.raises(UsageError, match="4 of 8 calls were not made by their batch"):
            in_batch(script, tmp_path)
        with pytest.raises(UsageError, match="--max_cost 0.03 dollars: 4 of 8 calls were not"):
            in_batch(script, tmp_path, max_cost=0.03)


@pytest.mark.usefixtures("no_sample")
@pytest.mark.parametrize("is_batch", [True, False])
def test_batches_of_other_questions_count_for_the_limit_of_dollars(tmp_path, monkeypatch, is_batch):
    prices = dict(price_input=0.0, price_output=100.0, max_reply_tokens=100)  # 0.01, or 0.005
    with serving(Script()) as script:
        stopped(script, tmp_path, monkeypatch, **prices)  # 8 calls, at most 0.04
        asked = options(script, batch=is_batch, max_retries=0, max_cost=0.045, **prices)
        others, judge = comparisons(7)[4:], make_judge(asked)
        with (
            VerdictLog(tmp_path / "verdicts.jsonl") as log,
            pytest.raises(UsageError, match="--max_cost 0.045 dollars: "),
        ):
            ask_judge(others, judge, asked, log)
        assert sum(script.calls.values()) == 8 + is_batch
        # What was collected counts as it was, 0.001 a call, and leaves room for the others.
        script.usage = {"prompt_tokens": 1, "completion_tokens": 20}
        assert in_batch(script, tmp_path, 7, max_cost=0.045, **prices).failures == {}


@pytest.mark.usefixtures("no_sample")
@pytest.mark.parametrize("fault", ["failed", "refused"])
def test_one_batch_that_failed_leaves_the_others_to_be_collected(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(batch, "MOST_CALLS", 3)
    with serving(Script()) as script:
        script.batches.polls = 3
        script.batches.faults = lambda number: fault if number == 1 else None
        with pytest.raises(UsageError, match="batch_1 failed|answers 400 to --batch .create."):
            in_batch(script, tmp_path)
        lines = (tmp_path / "verdicts.jsonl").read_text().splitlines()
        assert len(lines) == {"failed": 5, "refused": 3}[fault]
        script.batches.faults = lambda number: None
        assert in_batch(script, tmp_path).failures == {}
    assert set(script.calls.values()) == {1}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "answers 401 to --batch .poll.: check key"),
        (403, "answers 403 to --batch .poll.: check key"),
        (404, "has no batch batch_0: use the key that made it, or delete .*verdicts.jsonl.batches"),
    ],
)
def test_a_batch_that_is_refused_is_not_asked_for_again(tmp_path, status, message):
    polls = []

    def faults(path):
        if path.startswith("GET /v1/batches/"):
            polls.append(path)
            return f"status {status}"
        return None

    with serving(Script()) as script:
        script.batches.path_faults = faults
        with pytest.raises(UsageError, match=message):
            in_batch(script, tmp_path)
    assert len(polls) == 1


@pytest.mark.usefixtures("no_sample")
def test_failures_to_see_one_batch_are_not_forgotten_for_another(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MOST_CALLS", 4)
    monkeypatch.setattr(batch, "GIVE_UP_AFTER", 3)
    with serving(Script()) as script:
        script.batches.polls = 10**9
        script.batches.path_faults = lambda path: (
            "status 500" if path == "GET /v1/batches/batch_0" else None
        )
        with pytest.raises(UsageError, match="answers 500 to --batch .poll."):
            in_batch(script, tmp_path)


@pytest.mark.usefixtures("no_sample")
def test_a_batch_takes_fewer_calls_the_longer_their_replies(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MOST_ANSWERED", 4 * (4_000 + 12 * 100))
    with serving(Script()) as script:
        in_batch(script, tmp_path / "short", max_reply_tokens=100)
        assert len(script.batches.made) == 2
        in_batch(script, tmp_path / "long", max_reply_tokens=1000)
    assert len(script.batches.made) == 10
