"""Forecasts of what judging costs."""

from __future__ import annotations

import random
import re

import pytest

from softpref.errors import UsageError
from softpref.judging.account import Account
from softpref.judging.forecast import SAMPLE_CALLS, CountedCall, forecast, spread
from tests.judging.server import Script, serving
from tests.judging.test_endpoint import judged

PRICES = Account(2.0, 10.0)


def drawn(generator):
    """A call: 0.3 tokens a character, give or take; a reply of 20 to 400 tokens."""
    size = generator.randrange(500, 5000)
    return CountedCall(size, round(size * generator.gauss(0.3, 0.02)), generator.randrange(20, 400))


def test_the_interval_holds_what_the_rest_costs():
    """In 95% of 400 sets, by a count of each call's dollars."""
    held = {"input": 0, "output": 0, "dollars": 0}
    for seed in range(400):
        generator = random.Random(seed)
        calls = [drawn(generator) for _ in range(SAMPLE_CALLS + 200)]
        rest = calls[SAMPLE_CALLS:]
        found = forecast(calls[:SAMPLE_CALLS], [call.size for call in rest], PRICES)
        inputs, outputs = (sum(getattr(c, n) for c in rest) for n in
                           ("input_tokens", "output_tokens"))  # fmt: skip
        truths = {"input": inputs, "output": outputs, "dollars": (inputs * 2 + outputs * 10) / 1e6}
        pairs = (found.input_tokens, found.output_tokens, found.dollars)
        for (name, truth), (middle, margin) in zip(truths.items(), pairs, strict=True):
            held[name] += abs(middle - truth) <= margin
    assert all(0.92 <= count / 400 <= 0.98 for count in held.values()), held


def test_without_counts_or_prices_nothing_is_made_up():
    sample = [CountedCall(100, 30, 5)] * SAMPLE_CALLS
    assert forecast(sample, [100] * 10, Account()).dollars is None
    some = [CountedCall(100, 0, 0)] * 10
    assert forecast(sample[10:] + some, [100], PRICES).input_tokens == (30, 0)  # of 10 counts
    assert forecast(sample[11:] + some, [100], PRICES) is None


def test_the_sample_is_spread_over_all_questions():
    order = spread(1000)
    assert sorted(order) == list(range(1000))
    assert order[: SAMPLE_CALLS + 1] == [*range(0, 1000, 50), 1]
    assert spread(7) == list(range(7))
    assert spread(0) == []


def test_the_cost_is_said_before_the_rest_and_holds(tmp_path, caplog):
    """Questions grow longer through the file, so the first ones alone would mislead."""
    caplog.set_level("INFO", "softpref")
    with serving(Script()) as script:
        script.usage = lambda body: {
            "prompt_tokens": len(body["messages"][-1]["content"]) // 3,
            "completion_tokens": 20 + script.digest(body) % 380,
        }
        found = judged(script, tmp_path, 60, price_input=100.0, price_output=100.0)
        (line,) = re.findall(r".* more calls take.*", caplog.text)
        calls, dollars, margin = (
            float(re.search(words, line)[1])
            for words in (r"(\d+) more", r"tokens, ([\d.]+) ±", r"± ([\d.]+) dollars")
        )
        assert 120 - SAMPLE_CALLS - 8 <= calls <= 120 - SAMPLE_CALLS
        measured = found.dollars * calls / 120
        assert abs(dollars - measured) <= margin
        assert 0 < margin < dollars / 2
        assert re.search(r"dollars, about \d+ s ", line)
        caplog.clear()
        judged(script, tmp_path, 90, price_input=100.0, price_output=100.0)
        assert "60 more calls take" in caplog.text.partition("judging: 60 calls")[2]
        assert "--max_cost" not in caplog.text
        judged(script, tmp_path, 91, price_input=100.0, price_output=100.0, max_cost=100.0)
        assert "--max_cost" not in caplog.text


def test_a_limit_that_will_not_do_is_said_beforehand(tmp_path, caplog):
    caplog.set_level("INFO", "softpref")
    with serving(Script()) as script, pytest.raises(UsageError, match="calls were not made"):
        judged(script, tmp_path, 30, price_input=100.0, price_output=100.0, max_cost=0.5,
               max_reply_tokens=50, max_retries=0)  # fmt: skip
    assert "more than --max_cost 0.5 leaves" in caplog.text
