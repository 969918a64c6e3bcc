"""Reward models in an audit: scored once, weighed by the trusted pairs, whichever way they lean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import softpref
from softpref.auditing import opinions
from softpref.auditing.opinions import with_opinions
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.training.evidence import OPINION
from softpref.training.output import write_lines
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
from tests.toy import toy_pairs

SIZES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = make_tokenizer()
    tiny_llama(tokenizer, 0).save_pretrained(tmp_path / "sft")
    torch.manual_seed(0)
    reward = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **SIZES)
    )
    reward.save_pretrained(tmp_path / "reward")
    for name in ("sft", "reward"):
        tokenizer.save_pretrained(tmp_path / name)
    write_lines(tmp_path / "data.jsonl", toy_pairs(120, flip_every=4))
    write_lines(tmp_path / "clean.jsonl", toy_pairs(40, seed=1))
    return {name: str(tmp_path / file) for name, file in
            (("model", "sft"), ("data", "data.jsonl"), ("clean", "clean.jsonl"))}  # fmt: skip


class Knowing:
    """A reward model that knows the truth, and says it with a sign of its own."""

    sign = 1.0

    def __init__(self, source, *_):
        self.identity = {"weights": f"{source} {self.sign}"}

    def differences(self, batch):
        return [self.sign * (len(q.first) - len(q.second) + 0.5) for q in batch]


def test_the_difference_of_rewards_is_kept_by_content(files, tmp_path, monkeypatch):
    data, reward = load_pairs(files["data"]), str(tmp_path / "reward")
    (found,) = with_opinions([data], [reward, reward])
    opinion = torch.tensor(found.pairs[OPINION + reward])
    assert opinion.std() > 0
    turned = data.pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    (other,) = with_opinions([replace(data, pairs=turned)], [reward])
    assert torch.allclose(torch.tensor(other.pairs[OPINION + reward]), -opinion, atol=1e-5)
    monkeypatch.setattr(opinions.RewardModel, "differences", None)  # nobody is asked again
    (again,) = with_opinions([data], [reward])
    assert again.pairs[OPINION + reward][:] == found.pairs[OPINION + reward][:]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_opinion_is_weighed_by_the_trusted_pairs(files, monkeypatch, sign):
    """A model that is always wrong says as much as one that is always right."""
    truth = {}
    for path in (files["data"], files["clean"]):
        for row in load_pairs(path).pairs:
            flipped = bool(row.get("is_flipped"))
            truth[row["chosen"], row["rejected"]] = -1.0 if flipped else 1.0

    class Sure(Knowing):
        def differences(self, batch):
            return [sign * truth[q.first, q.second] for q in batch]

    Sure.sign = sign
    monkeypatch.setattr(opinions, "RewardModel", Sure)
    done = softpref.audit(**files, reward_model="rm")
    assert done.summary.signals == ["ppl_diff", "length", "content", "rm"]
    assert done.summary.trusted_auroc > 0.95
    assert done.summary.auroc > 0.95
    (most_suspect,) = (row for row in done.pairs if row["rank"] == 1)
    assert most_suspect["evidence"]["opinion of rm"] < -1
    assert most_suspect["why"].startswith("the opinion of rm speaks against the label")


def test_a_pair_that_cannot_be_scored_has_no_opinion(files, monkeypatch, caplog):
    class Silent(Knowing):
        def differences(self, batch):
            return [opinions.Answer(None, "does not fit the context"), float("nan"), 2.0][
                : len(batch)
            ]

    monkeypatch.setattr(opinions, "RewardModel", Silent)
    data = load_pairs(files["data"])
    few = replace(data, pairs=data.pairs.select(range(3)))
    (found,) = with_opinions([few], ["rm"])
    assert found.pairs["opinion of rm"][:] == [0.0, 0.0, 2.0]
    assert "rm: no opinion of 2 pairs" in caplog.text


def test_what_is_no_reward_model_is_named_by_its_option(files, tmp_path):
    with pytest.raises(UsageError, match="--reward_model"):
        softpref.audit(**files, reward_model=[str(tmp_path / "sft")])
