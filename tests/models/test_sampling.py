from collections import Counter
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from softpref.models.sampling import sample
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
    return sample(policy, TOKENIZER, [TOKENIZER(p)["input_ids"] for p in prompts], **options)


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


def by_hand(policy, prompt, ends=(TOKENIZER.eos_token_id,)):
    policy.eval()
    ids = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + 6 and ids[-1] not in ends:
        with torch.no_grad():
            ids.append(int(policy(torch.tensor([ids])).logits[0, -1].argmax()))
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


def likeliest(policy):
    """The first token of the greedy response to the first prompt."""
    with torch.no_grad():
        logits = policy.eval()(torch.tensor([TOKENIZER(PROMPTS[0])["input_ids"]])).logits
    return int(logits[0, -1].argmax())


STEERING = {
    "num_beams": lambda _: {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 5.0},
    "no_repeat_ngram_size": lambda _: {"no_repeat_ngram_size": 1},
    "penalties": lambda _: {"repetition_penalty": 30.0, "encoder_repetition_penalty": 30.0},
    "suppress_tokens": lambda first: {"suppress_tokens": [first]},
    "begin_suppress_tokens": lambda first: {"begin_suppress_tokens": [first]},
    "bad_words_ids": lambda first: {"bad_words_ids": [[first]]},
    "sequence_bias": lambda first: {"sequence_bias": [[[first], -50.0]]},
    "forced": lambda _: {"forced_bos_token_id": 7, "forced_eos_token_id": 8},
    "watermarking": lambda _: {"watermarking_config": {"bias": 50.0, "context_width": 1}},
    "stop_strings": lambda first: {"stop_strings": [TOKENIZER.decode([first])]},
    "lengths": lambda _: {"min_new_tokens": 6, "max_length": 1, "max_time": 0.0},
    "drawing": lambda _: {"do_sample": True, "temperature": 9.0, "min_p": 0.9, "typical_p": 0.1},
    "cache": lambda _: {"cache_implementation": "quantized", "use_cache": False},
    "output": lambda _: {"return_dict_in_generate": True, "output_scores": True},
    "guidance": lambda _: {"guidance_scale": 3.0, "prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("steering", STEERING.values(), ids=STEERING)
def test_greedy_takes_the_likeliest_token_whatever_the_model_s_own_settings(
    policy, steering, is_adapted
):
    expected = [by_hand(policy, prompt) for prompt in PROMPTS]
    own = GenerationConfig.from_dict(
        policy.generation_config.to_dict() | steering(likeliest(policy))
    )
    policy.generation_config = own
    before = own.to_dict()
    adapted = (
        get_peft_model(policy, LoraConfig(r=2, task_type="CAUSAL_LM")) if is_adapted else policy
    )
    assert draw(adapted, temperature=0) == expected
    assert policy.generation_config is own
    assert own.to_dict() == before


def test_the_model_s_own_settings_are_back_after_an_error(policy):
    own = policy.generation_config
    with pytest.raises(IndexError):
        sample(policy, TOKENIZER, [[10**6]], max_new_tokens=2, temperature=0, seed=0, batch_size=1)
    assert policy.generation_config is own


def test_a_response_ends_at_any_of_the_model_s_ends(policy):
    first = likeliest(policy)
    policy.generation_config.eos_token_id = [TOKENIZER.eos_token_id, first]
    ends = (TOKENIZER.eos_token_id, first)
    assert draw(policy, temperature=0) == [by_hand(policy, prompt, ends) for prompt in PROMPTS]
    assert draw(policy, temperature=0)[0] == TOKENIZER.decode([first])


def test_without_a_temperature_the_model_s_own_settings_draw(policy):
    first = likeliest(policy)
    greedy = draw(policy, temperature=0)
    own = policy.generation_config
    assert draw(policy, temperature=None) == greedy
    own.update(suppress_tokens=[first], max_length=1, num_beams=2, num_return_sequences=2)
    steered = draw(policy, temperature=None)
    assert len(steered) == len(PROMPTS)
    assert not any(TOKENIZER.decode([first]) in response.split() for response in steered)
    own.update(
        suppress_tokens=None, num_beams=1, num_return_sequences=1, do_sample=True, top_k=0,
        temperature=50.0,
    )  # fmt: skip
    assert draw(policy, temperature=None) == draw(policy, temperature=50.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_whole_softmax_whatever_the_model_s_own_settings(policy, temperature):
    with torch.no_grad():
        policy.lm_head.weight.div_(4)
    policy.eval()
    policy.generation_config.update(
        top_k=2, top_p=0.5, temperature=0.1, repetition_penalty=20.0, min_p=0.5, typical_p=0.3,
        epsilon_cutoff=0.2, eta_cutoff=0.2, top_h=0.1, suppress_tokens=[6],
    )  # fmt: skip
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
