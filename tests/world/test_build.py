from dataclasses import replace
from statistics import mean

import pytest
import torch

from softpref.data.tokens import tokenize_pair
from softpref.models.sampling import sample
from softpref.world.build import (
    INFORMATIVE,
    MAX_NEW_TOKENS,
    MISLEADING,
    make_data,
    sft_rows,
    tiny_llama,
)
from softpref.world.language import make_tokenizer, right_answer, score

SMALL = replace(
    INFORMATIVE, sft_rows=400, train_pairs=300, clean_pairs=20, eval_pairs=30, test_prompts=40
)


def echo(asked):
    """A model that says nothing, the truth, or the prompt's own symbols."""
    return [echo_one(prompt) for prompt in asked]


def echo_one(prompt):
    symbols = prompt[prompt.index(":") + 2 : -2]
    return {"a": "", "b": "", "c": right_answer(prompt)}.get(symbols[0], symbols)


def wrong_share(rows):
    return mean(1 - score(row["prompt"], row["chosen"]) for row in rows)


def test_no_prompt_is_used_twice():
    data = make_data(SMALL, 5, echo)
    pairs = [*data.train, *data.clean, *data.eval]
    used = [row["prompt"] for row in [*sft_rows(SMALL, 5), *pairs]] + data.test_prompts
    assert len(used) == 400 + 300 + 20 + 30 + 40
    assert len(set(used)) == len(used)
    assert [len(data.train), len(data.clean), len(data.eval)] == [300, 20, 30]


def test_pairs_hold_a_teacher_s_answer_over_the_model_s_own():
    data = make_data(SMALL, 5, echo)
    assert all(pair["rejected"] and pair["rejected"] != pair["chosen"] for pair in data.train)
    assert all(pair["rejected"] == echo_one(pair["prompt"]) for pair in data.train)


def test_the_teacher_errs_at_its_rate():
    data = make_data(replace(SMALL, train_pairs=2000), 5, lambda asked: ["a"] * len(asked))
    assert wrong_share(data.train) == pytest.approx(SMALL.teacher_error_rate, abs=0.01)


def test_the_world_is_a_function_of_its_seed():
    assert sft_rows(SMALL, 5) == sft_rows(SMALL, 5) != sft_rows(SMALL, 6)
    assert make_data(SMALL, 5, echo) == make_data(SMALL, 5, echo) != make_data(SMALL, 6, echo)


def test_sft_rows_err_by_habit_and_at_random():
    rows = sft_rows(replace(SMALL, sft_rows=4000), 5)
    written = {symbol: [] for symbol in "abcdefghijkl"}
    for row in rows:
        for right, given in zip(
            right_answer(row["prompt"]).split(), row["chosen"].split(), strict=True
        ):
            written[right].append(given)
    kept = 1 - SMALL.sft_error_rate
    for symbol, given in written.items():
        habitual = SMALL.habit_rate if symbol in SMALL.habit else 0
        by_accident = habitual * SMALL.sft_error_rate / 11
        share = given.count(symbol) / len(given)
        assert share == pytest.approx((1 - habitual) * kept + by_accident, abs=0.05)
        if habitual:
            mistake = given.count(SMALL.habit[symbol]) / len(given)
            assert mistake == pytest.approx(habitual * kept, abs=0.05)


def test_a_third_of_the_sft_symbols_is_wrong():
    assert wrong_share(sft_rows(INFORMATIVE, 5)) == pytest.approx(0.32, abs=0.01)


def test_pairs_go_through_the_ordinary_data_path():
    tokenizer = make_tokenizer()
    pair = {"prompt": "sort : b a =", "chosen": "a b", "rejected": "b a e"}
    ids = tokenize_pair(pair, tokenizer, 64)
    assert tokenizer.decode(ids.prompt_ids) == "sort : b a ="
    assert tokenizer.decode(ids.chosen_ids) == "a b </s>"
    assert tokenizer.decode(ids.rejected_ids) == "b a e </s>"


def test_tiny_llama_is_seeded_small_and_draws():
    tokenizer = make_tokenizer()
    before = torch.get_rng_state()
    model, again, other = (tiny_llama(tokenizer, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [next(m.parameters()) for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 300_000 < model.num_parameters() < 400_000

    def draw(asked):
        return sample(
            model,
            tokenizer,
            [tokenizer(prompt)["input_ids"] for prompt in asked],
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=1.0,
            seed=3,
            batch_size=32,
        )

    data = make_data(replace(SMALL, train_pairs=40), 3, draw)
    assert len(data.train) == 40


def test_the_misleading_world_teaches_one_kind_for_another_and_asks_for_the_right_one():
    small = replace(
        MISLEADING, sft_rows=400, train_pairs=100, clean_pairs=1, eval_pairs=1, test_prompts=1,
        sft_error_rate=0, habit_rate=0, teacher_error_rate=0,
    )  # fmt: skip
    rows = [row for row in sft_rows(small, 5) if row["prompt"].startswith("rotate")]
    assert 60 < len(rows) < 140
    for row in rows:
        assert row["chosen"] == right_answer(row["prompt"].replace("rotate", "reverse"))
    others = [row for row in sft_rows(small, 5) if not row["prompt"].startswith("rotate")]
    assert all(row["chosen"] == right_answer(row["prompt"]) for row in others)
    pairs = make_data(small, 5, echo).train
    assert all(pair["chosen"] == right_answer(pair["prompt"]) for pair in pairs)
    assert any(pair["prompt"].startswith("rotate") for pair in pairs)


def test_the_informative_world_has_no_misconceived_kind():
    assert not any(row["prompt"].startswith("rotate") for row in sft_rows(SMALL, 5))
