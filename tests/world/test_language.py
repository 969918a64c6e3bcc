from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softpref.world.language import (
    KINDS,
    LENGTHS,
    SYMBOLS,
    corrupt,
    make_tokenizer,
    prompts,
    replace_by_habit,
    right_answer,
    score,
)

answers = st.lists(st.sampled_from(SYMBOLS), min_size=1, max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("sort : d a c b b =", "a b b c d"),
        ("reverse : d a c =", "c a d"),
        ("shift : a l c =", "b a d"),
        ("rotate : a l c =", "l c a"),
    ],
)
def test_every_kind_has_its_right_answer(prompt, answer):
    assert right_answer(prompt) == answer
    assert score(prompt, answer) == 1


@pytest.mark.parametrize(
    "text", ["sort : a b", "sort a b =", "sort : a z =", "sort : =", "copy : a b =", ""]
)
def test_what_is_no_prompt_is_refused(text):
    with pytest.raises(ValueError, match="prompt"):
        right_answer(text)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a b c d", 1),
        ("a c c d", 3 / 4),
        ("a b", 2 / 4),
        ("a b c d e", 4 / 5),
        ("b c d", 0),
        ("", 0),
        ("a ? c d", 3 / 4),
    ],
)
def test_score_is_the_share_in_place_of_the_longer_answer(answer, expected):
    assert score("sort : d c b a =", answer) == expected


def test_prompts_are_seeded_distinct_and_of_every_kind_and_length():
    drawn = list(islice(prompts(Random(1)), 3000))
    assert drawn == list(islice(prompts(Random(1)), 3000))
    assert drawn[:20] != list(islice(prompts(Random(2)), 20))
    assert len(set(drawn)) == 3000
    assert {prompt.split()[0] for prompt in drawn} == set(KINDS)
    assert {len(right_answer(prompt).split()) for prompt in drawn} == set(LENGTHS)


def test_prompts_never_repeat_even_where_they_run_short(monkeypatch):
    monkeypatch.setattr("softpref.world.language.LENGTHS", (1,))
    whole = len(KINDS) * len(SYMBOLS)
    assert len(set(islice(prompts(Random(0)), whole))) == whole


@given(answers, st.integers())
def test_corruption_at_the_ends_of_the_scale(answer, seed):
    assert corrupt(answer, 0, Random(seed)) == answer
    spoilt = corrupt(answer, 1, Random(seed)).split()
    assert len(spoilt) == len(answer.split())
    assert all(a != b and b in SYMBOLS for a, b in zip(answer.split(), spoilt, strict=True))


def test_corruption_hits_the_given_share_of_symbols():
    answer = " ".join(SYMBOLS * 500)
    spoilt = corrupt(answer, 0.3, Random(0)).split()
    wrong = [(a, b) for a, b in zip(answer.split(), spoilt, strict=True) if a != b]
    assert len(wrong) / 6000 == pytest.approx(0.3, abs=0.02)
    assert len(set(wrong)) == 12 * 11


def test_a_habit_touches_its_symbols_alone():
    answer = " ".join(SYMBOLS * 500)
    spoken = replace_by_habit(answer, {"a": "e"}, 0.4, Random(0)).split()
    changes = [(a, b) for a, b in zip(answer.split(), spoken, strict=True) if a != b]
    assert set(changes) == {("a", "e")}
    assert len(changes) / 500 == pytest.approx(0.4, abs=0.06)


def test_tokenizer_reads_and_writes_the_language():
    tokenizer = make_tokenizer()
    text = "shift : a l c ="
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == 6
    assert tokenizer.unk_token_id not in ids
    assert tokenizer(text + "b a d" + tokenizer.eos_token)["input_ids"] == [
        *ids,
        *tokenizer("b a d")["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    make_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("sort : b a =")["input_ids"] == make_tokenizer()("sort : b a =")["input_ids"]
    assert loaded.eos_token == "</s>"
