"""The first and the last id of a vocabulary, and the shortest prompts and responses.

Id 0 also fills the padding, where it must not be taken for a token, nor a token for padding.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softpref.algorithm.likelihood import measure
from softpref.data.batches import make_batch, make_shared_batch
from softpref.data.tokens import tokenize_pairs
from tests.tiny import slow_logp, tiny_model, without_float32
from tests.toy import pairs_from_dataset

WORDS = ["first", "<s>", "</s>", "b", "c", "d", "last"]
FIRST, EOS, LAST = 0, 2, len(WORDS) - 1
B, C = WORDS.index("b"), WORDS.index("c")

# prompt, chosen, rejected: as text, and what tokens they are
EDGES = [
    ("first", " first", " last", [FIRST], [FIRST, EOS], [LAST, EOS]),
    ("last", " last first", " first last", [LAST], [LAST, FIRST, EOS], [FIRST, LAST, EOS]),
    ("first last", " </s>", " first", [FIRST, LAST], [EOS], [FIRST, EOS]),
    ("last first", " first first", " </s>", [LAST, FIRST], [FIRST, FIRST, EOS], [EOS]),
    ("b last c", " last", " b c first last b", [B, LAST, C], [LAST, EOS],
     [B, C, FIRST, LAST, B, EOS]),
]  # fmt: skip
# The same, where only one token of a response fits beside a prompt of one token.
CUT = [
    ("first", " first", " last", [FIRST], [FIRST], [LAST]),
    ("last", " last", " </s>", [LAST], [LAST], [EOS]),
]
LAYOUTS = {
    "padded": make_batch,
    "shared": make_shared_batch,
    "packed": partial(make_shared_batch, hidden_size=1),
    "packed long": partial(make_shared_batch, hidden_size=10_000),
}


def tokenized(edges, max_length: int) -> list[dict]:
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="b")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    rows = [dict(zip(("prompt", "chosen", "rejected"), edge, strict=False)) for edge in edges]
    pairs = pairs_from_dataset(Dataset.from_list(rows), "edges").pairs
    found = tokenize_pairs(pairs, fast, max_length, name="edges").pairs.to_list()
    return [{**pair, "ref_chosen_logp": -1.5 - i, "ref_rejected_logp": -2.0 * i}
            for i, pair in enumerate(found)]  # fmt: skip


PAIRS = {"whole": tokenized(EDGES, 16), "cut": tokenized(CUT, 2)}


@pytest.mark.parametrize(("which", "edges"), [("whole", EDGES), ("cut", CUT)])
def test_texts_of_the_edges_are_these_tokens(which, edges):
    for pair, (*_, prompt, chosen, rejected) in zip(PAIRS[which], edges, strict=True):
        assert pair["prompt_ids"] == prompt
        assert pair["chosen_ids"] == chosen
        assert pair["rejected_ids"] == rejected


def log_ppl(policy, prompt: list[int], response: list[int], scope: str) -> float:
    """Mean negative log-probability; the first token of a prompt has none."""
    total, count = slow_logp(policy, prompt, response), len(response)
    if scope != "response":
        total += slow_logp(policy, prompt[:1], prompt[1:])
    if scope == "sequence":
        count += len(prompt) - 1
    return -total / count


def expected(policy, pair: dict, scope: str) -> tuple[float, float]:
    """Margin (Eq. 1) and PPLDiff (Eq. 4, 5) of one pair, one sequence after the other."""
    prompt, chosen, rejected = (pair[f"{part}_ids"] for part in ("prompt", "chosen", "rejected"))
    margin = (slow_logp(policy, prompt, chosen) - pair["ref_chosen_logp"]) - (
        slow_logp(policy, prompt, rejected) - pair["ref_rejected_logp"]
    )
    return margin, log_ppl(policy, prompt, chosen, scope) - log_ppl(policy, prompt, rejected, scope)


@pytest.mark.parametrize("scope", ["response", "sequence", "sequence_per_response_token"])
@pytest.mark.parametrize("head", ["all", "scored"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_margins_and_ppl_diffs_at_the_edges_equal_a_slow_loop(architecture, layout, head, scope):
    policy = without_float32(tiny_model(architecture, vocab_size=len(WORDS)))
    with torch.no_grad():
        for pairs in PAIRS.values():
            found = measure(policy, LAYOUTS[layout](pairs, head_positions=head), scope)
            truth = torch.tensor([expected(policy, pair, scope) for pair in pairs]).double()
            torch.testing.assert_close(found.margin, truth[:, 0], rtol=0, atol=1e-6)
            torch.testing.assert_close(found.ppl_diff, truth[:, 1], rtol=0, atol=1e-6)
