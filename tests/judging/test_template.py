"""What an endpoint is shown, and what counts as its verdict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softpref.judging.questions import Question
from softpref.judging.template import read_reply, render

texts = st.text()


@given(texts, texts, texts)
def test_every_text_stands_between_marks_as_it_is(prompt, first, second):
    mark = "<0123456789abcdef01234567>"
    system, user = render(Question("u", prompt, first, second, False), mark)
    assert mark in system["content"]
    parts = user["content"].split(f"{mark} ")
    assert parts[1:4] == [
        f"PROMPT\n{prompt}\n", f"RESPONSE A\n{first}\n", f"RESPONSE B\n{second}\n"
    ]  # fmt: skip


def test_a_conversation_is_shown_with_its_roles():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    _, user = render(Question("u", prompt, "1", "2", False), "<m>")
    assert "system: Be brief.\n\nuser: Hi." in user["content"]


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        ('{"justification": "x", "verdict": "A"}', "A"),
        ('{"verdict": "tie"}', "tie"),
        ('```json\n{"justification": "x", "verdict": "B"}\n```', "B"),
        ("A", None),
        ("I think A is better.", None),
        ('Sure! {"verdict": "A"}', None),
        ('{"verdict": "a"}', None),
        ('{"verdict": ["A"]}', None),
        ('["A"]', None),
        ('{"verdict": "A"', None),
        ("[" * 100_000, None),
        ("", None),
        (None, None),
    ],
)
def test_a_verdict_is_read_from_json_alone(content, verdict):
    read = read_reply(content)
    assert (read and read[0]) == verdict


@given(st.text())
def test_no_reply_breaks_the_reading(content):
    read_reply(content)
