"""Hard and easy pairs: sizes by a token-by-token loop, labels that do not matter, shares."""

from __future__ import annotations

import json

import pytest
import torch

from softpref.columns import STANDARD
from softpref.data.sources import load_pairs
from softpref.data.tokens import tokenize_pairs
from softpref.errors import UsageError
from softpref.models import difficulty
from softpref.models.difficulty import flip_rates, hard_pairs, inject_by_difficulty, log_ratio_sizes
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model
from tests.toy import toy_pairs

COUNT = 60


@pytest.fixture(scope="module")
def surrogate(tmp_path_factory):
    directory = tmp_path_factory.mktemp("surrogate")
    tiny_model(dtype=torch.float32, attention="sdpa").save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def source(tmp_path):
    toy_pairs(COUNT).remove_columns("is_flipped").to_json(tmp_path / "pairs.jsonl")
    return str(tmp_path / "pairs.jsonl")


def sizes_of(source, surrogate, max_length=64, columns=STANDARD) -> torch.Tensor:
    return log_ratio_sizes(source, surrogate, max_length, trust_remote_code=False, columns=columns)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def rewrite(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_sizes_equal_a_token_by_token_loop(source, surrogate):
    policy = tiny_model(dtype=torch.float32, attention="sdpa")
    pairs = tokenize_pairs(load_pairs(source).pairs, make_tokenizer(), 64, name="pairs").pairs

    def logp(prompt, response):
        total = 0.0
        for t, token in enumerate(response):
            logits = policy(torch.tensor([[*prompt, *response[:t]]])).logits[0, -1]
            total += float(logits.double().log_softmax(-1)[token])
        return total

    expected = []
    with torch.no_grad():
        for pair in pairs:
            logps = [logp(pair["prompt_ids"], pair[f"{y}_ids"]) for y in ("chosen", "rejected")]
            expected.append(abs(logps[0] - logps[1]))
    sizes = sizes_of(source, surrogate)
    assert sizes.dtype == torch.float64
    assert sizes.tolist() == pytest.approx(expected, abs=1e-4)
    assert max(expected) > 1  # nats: there is something to tell apart


def test_the_batch_size_does_not_matter(source, surrogate, monkeypatch):
    monkeypatch.setattr(difficulty, "_BATCH_SIZE", 1)
    alone = sizes_of(source, surrogate)
    monkeypatch.setattr(difficulty, "_BATCH_SIZE", 25)
    together = sizes_of(source, surrogate)
    assert torch.allclose(alone, together, atol=1e-4, rtol=0)
    assert torch.equal(hard_pairs(alone), hard_pairs(together))


def test_labels_do_not_matter_to_the_last_bit(source, surrogate, tmp_path):
    rows = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if i % 3 else row
        for i, row in enumerate(lines(source))
    ]
    turned = rewrite(tmp_path / "turned.jsonl", rows)
    assert torch.equal(sizes_of(source, surrogate), sizes_of(turned, surrogate))


def test_sizes_follow_the_order_of_the_file(source, surrogate, tmp_path):
    backwards = rewrite(tmp_path / "backwards.jsonl", lines(source)[::-1])
    expected = sizes_of(source, surrogate).flip(0)
    assert torch.allclose(sizes_of(backwards, surrogate), expected, atol=1e-4, rtol=0)


def test_hard_is_below_the_median_and_ties_go_together():
    def hard(*sizes: float) -> list[bool]:
        return hard_pairs(torch.tensor(sizes, dtype=torch.float64)).tolist()

    assert hard(3, 1, 4, 2) == [False, True, False, True]
    assert hard(3, 1, 2) == [False, True, False]
    assert hard(0, 2, 2, 2, 5) == [True, False, False, False, False]
    assert hard(2, 2, 9, 9) == [True, True, False, False]
    assert hard(1, 1, 1) == [False] * 3
    assert flip_rates(torch.tensor([True, False]), 0.4, 0.1) == [0.4, 0.1]


def test_hard_pairs_are_flipped_more_often_and_the_truth_is_kept(source, surrogate, tmp_path):
    output = tmp_path / "noisy.jsonl"
    done = inject_by_difficulty(source, str(output), surrogate, 3, hard_rate=0.9, easy_rate=0.05)
    sizes = sizes_of(source, surrogate)
    middle = sorted(sizes.tolist())[COUNT // 2 - 1 : COUNT // 2 + 1]
    assert middle[0] < done.median < middle[1]
    assert (done.hard.pairs, done.easy.pairs) == (COUNT // 2, COUNT // 2)
    assert done.hard.flipped + done.easy.flipped == done.every.flipped
    before, after = lines(source), lines(output)
    flipped_sizes: dict[bool, list[float]] = {True: [], False: []}
    for row, new, size in zip(before, after, sizes.tolist(), strict=True):
        right, wrong = row["chosen"], row["rejected"]
        assert [new["chosen"], new["rejected"]] == (
            [wrong, right] if new["is_flipped"] else [right, wrong]
        )
        flipped_sizes[new["is_flipped"]].append(size)
    hard_flips = sum(size < done.median for size in flipped_sizes[True])
    assert hard_flips == done.hard.flipped
    assert 22 <= done.hard.flipped <= 30  # of 30 at 0.9: beyond with probability 1%
    assert 0 <= done.easy.flipped <= 5  # of 30 at 0.05: beyond with probability 0.3%
    assert (done.hard.rate, done.easy.rate, done.every.rate) == (0.9, 0.05, pytest.approx(0.475))


@pytest.mark.parametrize("seed", range(3))
def test_realised_shares_are_within_binomial_bounds(source, surrogate, tmp_path, monkeypatch, seed):
    """At the paper's rates, over so many pairs that four standard deviations part 0.4 from 0.1."""
    rows = [
        {"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(2000)
    ]  # the sizes are made up
    many = rewrite(tmp_path / "many.jsonl", rows)
    sizes = torch.rand(2000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    monkeypatch.setattr(difficulty, "log_ratio_sizes", lambda *_, **__: sizes)
    done = inject_by_difficulty(many, str(tmp_path / "noisy.jsonl"), surrogate, seed)
    for group, rate in ((done.hard, 0.4), (done.easy, 0.1)):
        assert group.pairs == 1000
        assert abs(group.realised_rate - rate) < 4 * (rate * (1 - rate) / 1000) ** 0.5
    smallest = set(sizes.argsort()[:1000].tolist())
    flipped = [n for n, row in enumerate(lines(tmp_path / "noisy.jsonl")) if row["is_flipped"]]
    assert sum(n in smallest for n in flipped) == done.hard.flipped


def test_the_same_seed_gives_the_same_file_and_a_second_time_the_source(
    source, surrogate, tmp_path
):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "back.jsonl", "other.jsonl")]
    a, b, back, other = map(str, paths)
    first = inject_by_difficulty(source, a, surrogate, 5)
    assert 0 < first.every.flipped < COUNT
    inject_by_difficulty(source, b, surrogate, 5)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    inject_by_difficulty(a, back, surrogate, 5)
    assert lines(back) == [row | {"is_flipped": False} for row in lines(source)]
    assert inject_by_difficulty(source, other, surrogate, 6).every.flips != first.every.flips


def test_a_pair_the_surrogate_cannot_read_is_named(source, surrogate, tmp_path):
    rows = lines(source)
    long = rewrite(tmp_path / "long.jsonl", [rows[0], rows[1] | {"prompt": "sort : a " * 30}])
    for max_length in (64, 1024):  # the model's context is 64
        with pytest.raises(
            UsageError, match=r"line 2: longer than .* remove it, raise --max_length"
        ):
            sizes_of(long, surrogate, max_length)
    with pytest.raises(
        UsageError, match=r"line 1: longer than --max_length 3: the prompt alone has 9"
    ):
        sizes_of(source, surrogate, 3)
    bad = rewrite(tmp_path / "bad.jsonl", [*rows, {"prompt": "sort : a ="}])
    with pytest.raises(UsageError, match=r"line 61: chosen is missing.*Fix or remove it"):
        sizes_of(bad, surrogate)


def test_a_surrogate_without_finite_log_probabilities_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(difficulty, "require_sound", lambda _: None)  # its weights tell already
    model = tiny_model(dtype=torch.float32, attention="sdpa")
    token = make_tokenizer()("c")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    read = (" ".join(row[part] for part in row).split() for row in lines(source))
    bad = [number for number, symbols in enumerate(read, start=1) if "c" in symbols]
    assert 1 < len(bad) < COUNT
    with pytest.raises(UsageError) as refused:
        sizes_of(source, str(tmp_path / "broken"))
    assert f"of {len(bad)} pairs are not finite, first in {source}, line {bad[0]}:" in str(
        refused.value
    )
