from collections import Counter
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from softpref.evaluation.generate import sample
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer

TOKENIZER = make_tokenizer()
PROMPTS = ["sort : b a c =", "reverse : a =", "shift : d e f g h =", "sort : c b a d ="]


@pytest.fixture
def policy():
    model = tiny_llama(TOKENIZER, 0)
    with torch.no_grad():  # an untrained model's choices are near a tie
        model.lm_head.weight.mul_(20)
    return model


def draw(policy, prompts=PROMPTS, **changes):
    options = {"max_new_tokens": 6, "temperature": 1.0, "seed": 1, "batch_size": 2} | changes
    return sample(policy, TOKENIZER, prompts, **options)


def test_equal_seeds_give_equal_responses_and_leave_the_random_state_alone(policy):
    before = torch.get_rng_state()
    first = draw(policy)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert draw(policy) == first
    assert draw(policy, seed=2) != first


def test_greedy_ignores_seed_batching_and_neighbours(policy):
    greedy = partial(draw, policy, temperature=0)
    alone = [greedy([prompt])[0] for prompt in PROMPTS]
    assert greedy() == greedy(seed=2) == greedy(batch_size=4) == alone
    assert len(set(alone)) > 1


def test_greedy_takes_the_likeliest_token_at_every_step(policy):
    policy.eval()
    for prompt, response in zip(PROMPTS, draw(policy, temperature=0), strict=True):
        ids = TOKENIZER(prompt)["input_ids"]
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != TOKENIZER.eos_token_id:
            with torch.no_grad():
                ids.append(int(policy(torch.tensor([ids])).logits[0, -1].argmax()))
        assert response == TOKENIZER.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_whole_softmax_whatever_the_model_s_own_settings(policy, temperature):
    with torch.no_grad():
        policy.lm_head.weight.div_(4)
    policy.eval()
    policy.generation_config.update(top_k=2, top_p=0.5, temperature=0.1, repetition_penalty=20.0)
    with torch.no_grad():
        logits = policy(torch.tensor([TOKENIZER(PROMPTS[0])["input_ids"]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    n = 4000
    drawn = Counter(
        draw(policy, [PROMPTS[0]] * n, max_new_tokens=1, temperature=temperature, batch_size=1000)
    )
    plain = [i for i in range(len(TOKENIZER)) if i not in TOKENIZER.all_special_ids]
    for i in plain:
        share = float(expected[i])
        spread = 5 * (share * (1 - share) / n) ** 0.5
        assert drawn[TOKENIZER.decode([i])] / n == pytest.approx(share, abs=spread)


def test_a_response_ends_at_the_end_of_sequence(policy):
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    responses = draw(policy, PROMPTS * 50, max_new_tokens=30, batch_size=50)
    lengths = [len(response.split()) for response in responses]
    assert min(lengths) < 5
    assert not any("<" in response for response in responses)


def test_dropout_is_off_and_the_mode_restored(policy):
    policy.train()
    policy.config.attention_dropout = 0.9
    for module in policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.9
    assert draw(policy, temperature=0) == draw(policy, temperature=0, seed=5)
    assert policy.training


def test_no_prompts_no_responses(policy):
    assert draw(policy, []) == []


def test_an_adapter_on_a_model_draws_too(policy):
    adapted = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear"))
    expected = draw(policy, temperature=0)
    assert draw(adapted, temperature=0) == expected  # an untrained adapter changes nothing
