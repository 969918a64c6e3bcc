"""Judges that think before they answer."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from softpref.errors import UsageError
from softpref.judging.failures import CUT_OFF, CUT_ONCE
from softpref.judging.log import VerdictLog
from tests.judging.server import Script, serving
from tests.judging.test_endpoint import judged

KINDS = pytest.mark.parametrize("kind", ["schema", "words"])
"""Chat completions, whose thoughts are not shown, and servers without structured output."""


def thinking(tokens, kind, **script):
    made = Script(**script)
    made.thinks, made.shows_thoughts = tokens, kind == "words"
    return made


def limits(script):
    return Counter(
        (name, body[name])
        for body in script.bodies
        for name in ("max_tokens", "max_completion_tokens")
        if name in body
    )


@KINDS
def test_thoughts_of_3000_tokens_fit_and_are_not_read(tmp_path, kind):
    with serving(thinking(3000, kind)) as script:
        found = judged(script, tmp_path, 3, structured_output=kind)
    assert found.failures == {}
    assert {o.result for o in found.outcomes} == {"win", "tie"}
    assert set(script.calls.values()) == {1}
    assert found.output_tokens == 6 * 3020


@KINDS
def test_a_reply_that_is_cut_off_is_asked_for_once_more_with_more_room(tmp_path, kind):
    faults = dict(faults=lambda _: "wants max_completion_tokens")
    with serving(thinking(5000, kind, **faults)) as script:
        found = judged(
            script, tmp_path, 3, concurrency=1, structured_output=kind, reasoning_effort="low"
        )
        assert found.failures == {}
        # The name of the limit is learned from the first refusal, for the run.
        assert limits(script) == {("max_tokens", 4096): 1, ("max_completion_tokens", 4096): 6,
                                  ("max_completion_tokens", 16384): 6}  # fmt: skip
        assert {body["reasoning_effort"] for body in script.bodies} == {"low"}
        assert all(("response_format" in body) == (kind == "schema") for body in script.bodies)
        assert (found.input_tokens, found.output_tokens) == (12 * 100, 6 * (4096 + 5020))
        again = judged(script, tmp_path, 3, structured_output=kind, reasoning_effort="low")
        assert again == found
        assert len(script.bodies) == 13


def test_endless_thoughts_stop_the_run_and_the_flag_that_helps_is_named(tmp_path):
    with serving(thinking(10**6, "schema")) as script:
        with pytest.raises(UsageError) as end:
            judged(script, tmp_path, 40, concurrency=2)
        assert "(cut off): replies do not fit into 16,384 tokens: give a larger" in str(end.value)
        assert "larger --max_reply_tokens, or --reasoning_effort low" in str(end.value)
        assert len(script.bodies) < 2 * 24
        script.thinks = 0
        assert judged(script, tmp_path, 40).failures == {}


def test_a_context_without_more_room_leaves_the_reply_cut_off(tmp_path):
    with serving(thinking(5000, "schema")) as script:
        script.judge = lambda *_: "A"
        script.faults = lambda digest: "status 400" if script.calls[digest] == 2 else None
        assert judged(script, tmp_path, 2).failures == {CUT_OFF: 4}


def test_a_kill_before_the_longer_reply_pays_no_call_twice(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(log, *row):
        add(log, *row)
        if len(log.path.read_bytes().splitlines()) == 5:
            raise Killed

    add = VerdictLog.add
    with serving(thinking(5000, "schema")) as script:
        monkeypatch.setattr(VerdictLog, "add", dying)
        with pytest.raises(Killed):
            judged(script, tmp_path, 4, concurrency=1)
        monkeypatch.setattr(VerdictLog, "add", add)
        rows = [json.loads(r) for r in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
        assert rows[-1]["failure"] == CUT_ONCE
        before = sum(script.calls.values())
        found = judged(script, tmp_path, 4, concurrency=1)
        assert found.output_tokens == 8 * (4096 + 5020)
        assert (before, sum(script.calls.values())) == (5, 2 * 8)


def test_the_longer_reply_counts_for_the_limit_of_dollars(tmp_path):
    prices = dict(price_input=0.0, price_output=10.0, max_retries=0, concurrency=1)
    with serving(thinking(5000, "schema")) as script:
        # A first reply is 0.04096 dollars; a longer one is 0.0502, and at most 0.16384.
        with pytest.raises(UsageError, match=r"--max_cost .*: 4 of 4 calls were not made"):
            judged(script, tmp_path, 2, max_cost=0.2, **prices)
        assert len(script.bodies) == 1
        with pytest.raises(UsageError, match=r"--max_cost .*: 3 of 4 calls were not made"):
            judged(script, tmp_path, 2, max_cost=0.21, **prices)
        assert [body["max_tokens"] for body in script.bodies] == [4096, 16384, 4096]
        assert judged(script, tmp_path, 2, max_cost=9.0, **prices).failures == {}
        assert len(script.bodies) == 8


@pytest.mark.parametrize(
    "error",
    [
        {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."},
        {"param": "max_tokens", "code": "unsupported_parameter"},
        {"param": "max_tokens", "message": "Use 'max_completion_tokens' instead."},
    ],
)
def test_the_other_name_of_the_limit_is_learned_from_parameter_or_message(tmp_path, error):
    with serving(Script()) as script:
        refusal = f"error {json.dumps(error)}"
        script.faults = lambda _: refusal if "max_tokens" in script.bodies[-1] else None
        assert judged(script, tmp_path, 1, concurrency=1).failures == {}
        assert limits(script) == {("max_tokens", 4096): 1, ("max_completion_tokens", 4096): 2}


def test_a_limit_that_is_too_large_is_not_taken_for_a_wrong_name(tmp_path):
    error = {"param": "max_tokens", "message": "max_tokens is too large: 4096", "code": "invalid"}
    with serving(Script(faults=lambda _: f"error {json.dumps(error)}")) as script:
        with pytest.raises(UsageError, match="2 calls in a row failed .status 400."):
            judged(script, tmp_path, 1, concurrency=1)
        assert limits(script) == {("max_tokens", 4096): 2}


def test_a_level_of_reasoning_that_the_endpoint_refuses_is_named(tmp_path):
    refusal = f"error {json.dumps({'param': 'reasoning_effort'})}"
    with (
        serving(Script(faults=lambda _: refusal)) as script,
        pytest.raises(UsageError, match="refuses --reasoning_effort much: give a level"),
    ):
        judged(script, tmp_path, 2, reasoning_effort="much")
