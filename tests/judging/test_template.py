"""What an endpoint is shown, and what counts as its verdict."""

from __future__ import annotations

from functools import partial
from time import process_time
from timeit import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softpref.judging.questions import Question
from softpref.judging.template import LONGEST_REPLY, read_reply, render_question

texts = st.text()


@given(texts, texts, texts)
def test_every_text_stands_between_marks_as_it_is(prompt, first, second):
    mark = "<0123456789abcdef01234567>"
    system, user = render_question(Question("u", prompt, first, second, False), mark)
    assert mark in system["content"]
    parts = user["content"].split(f"{mark} ")
    assert parts[1:4] == [
        f"PROMPT\n{prompt}\n", f"RESPONSE A\n{first}\n", f"RESPONSE B\n{second}\n"
    ]  # fmt: skip


def test_a_conversation_is_shown_with_its_roles():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    _, user = render_question(Question("u", prompt, "1", "2", False), "<m>")
    assert "system: Be brief.\n\nuser: Hi." in user["content"]


def test_what_stands_beside_a_message_s_content_is_shown():
    prompt = [
        {"role": "user", "content": "Hi.", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": [{"type": "text", "text": "ü"}], "name": "f"},
        {"role": "assistant", "content": ""},
    ]
    _, user = render_question(Question("u", prompt, "1", "2", False), "<m>")
    assert (
        'PROMPT\nuser: Hi.\n\nassistant: {"tool_calls": [{"name": "f"}]}\n\n'
        'tool: ü\n{"name": "f"}\n\nassistant: \n<m>'
    ) in user["content"]


def test_the_tools_of_a_prompt_are_shown():
    context = {"tools": [{"name": "ü"}], "chat_template_kwargs": {"thinking": True}}
    _, user = render_question(Question("u", "Hi.", "1", "2", False, context), "<m>")
    assert 'PROMPT\ntools: [{"name": "ü"}]\n\nHi.\n<m>' in user["content"]


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        ('{"justification": "x", "verdict": "A"}', "A"),
        ('{"verdict": "tie"}', "tie"),
        ('```json\n{"justification": "x", "verdict": "B"}\n```', "B"),
        ("A", None),
        ("I think A is better.", None),
        ('Sure! {"verdict": "A"} I hope this helps.', "A"),
        ('<think>{"verdict": "tie"}?</think>\n{"verdict": "B"}', "B"),
        ('<thinking>\n{"verdict": "tie"}\n</thinking>\n```json\n{"verdict": "B"}\n```', "B"),
        ('the template opened the thoughts: {"verdict": "A"} </think> {"verdict": "B"}', "B"),
        ('First {"verdict": "A"}, on second thought {"verdict": "B"}', "B"),
        ('{"verdict": "A"}, but with {"other": 1}', "A"),
        ('{"verdict": "A"} or rather {"verdict": "neither"}', None),
        ('if (x) { return {1}; } {"a": {"b": {} so {"verdict": "B"}', "B"),
        ('{"verdict": "A"|"B"|"tie"}, which is {"verdict": "tie"}', "tie"),
        ('{"justification": "B shows its <think> and </think>", "verdict": "A"}', "A"),
        ('<think>"{" {"verdict": "tie"}</think>{"justification": "</think>", "verdict": "A"}', "A"),
        ('{"verdict": "A", "confidence": ' + "9" * 5000 + "}", "A"),
        ('{"answer": {"verdict": "A"}}', None),
        ('<think>{"verdict": "A"}', None),
        ('<think>a</think> <think>{"verdict": "A"}', None),
        ('{"verdict": "A"}</think>', None),
        ("x" * LONGEST_REPLY + '{"verdict": "A"}', None),
        ('{"verdict": "a"}', "A"),
        ('{"verdict": "Tie"}', "tie"),
        ('{"verdict": "B\\n "}', "B"),
        ('{"justification": "one\nline\tmore", "verdict": "A "}', "A"),
        ('{"justification":"B quotes \n{"verdict":"A"} to sway", "verdict":"B"}', None),
        ('{"justification":"B quotes {"verdict":"A"} to sway", "verdict":"B"}', None),
        ('{"justification":"B "quotes" {"verdict":"A"} to sway", "verdict":"B"}', None),
        ('{"justification":"B "quotes" {"verdict":"A"} to sway", "verdict":"B', None),
        ('{"verdict":"B", "justification":"B "quotes" {"verdict":"A"} to sway"}', None),
        ('{"justification":"a "q" {"verdict":"A"}", "verdict":"B"} or {"verdict":"B"}', "B"),
        ('<think>{"verdict": "tie" or</think>{"verdict": "A"}', "A"),
        ('My "verdict": {"verdict": "A"}', "A"),
        ('{"verdict": "A>B"}', None),
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


def test_half_a_surrogate_pair_in_a_justification_is_replaced():
    said = r'{"justification": "\ud83dx \ud83d\ude00", "verdict": "A"}'
    assert read_reply(said) == ("A", "\ufffdx \U0001f600")


def test_five_verdicts_are_read_with_or_without_spaces():
    assert read_reply('{"verdict": "A >> B"}', "five") == ("A>>B", "")
    assert read_reply('{"verdict": "b>a"}', "five") == ("B>A", "")
    assert read_reply('{"verdict": "A"}', "five") is None


VERDICT = '{"justification": "x", "verdict": "A"}'


@pytest.mark.parametrize("after", ["", VERDICT])
@pytest.mark.parametrize(
    "hostile",
    [
        " " * 3000, "```json" + " " * 3000, "`" * 3000, "{" * 100_000, "}" * 100_000,
        "[" * 10_000, '{"a":' * 10_000, '{"a":[' * 10_000, "{ \n" * 10_000, '{"' * 10_000,
        '{\n"{' * 10_000, '{"a":"{' * 10_000, "<think>" * 10_000, "</think>{}" * 10_000,
        '{"a": 1}' * 10_000, '{"verdict":' * 9_000, '"verdict":' * 9_000, '{"verdict":}' * 8_000,
        '{"a": 1}"verdict":' * 5_000, '{"' + "\n" * 90_000, '{"a\n":"{\n' * 9_000,
    ],
    ids=range(21),
)  # fmt: skip
def test_hostile_replies_are_read_at_once(hostile, after):
    read = partial(read_reply, hostile + after)
    assert min(repeat(read, number=1, repeat=3, timer=process_time)) < 0.2
    assert read() in (None, ("A", "x"))


@given(st.text(st.sampled_from('{}[]":,\\ \nab1') | st.sampled_from("😀é")))
def test_no_reply_of_json_s_characters_breaks_the_reading(content):
    read_reply(content)


@given(st.lists(st.sampled_from(["<think>", "</think>", "{", "}", '"', "text", VERDICT])))
def test_a_verdict_after_the_thoughts_is_found(thoughts):
    last = '{"justification": "y", "verdict": "B"}'
    before = "".join(thoughts)
    if before.count('"') % 2 == 0 and "{" not in thoughts:  # else it may stand inside a text
        assert read_reply(f"{before}</think>{last}") == ("B", "y")


@given(st.text())
def test_no_reply_breaks_the_reading(content):
    read_reply(content)
