"""Scoring pairs as the audit does, against a bare forward pass of the same model.

10,000 random pairs of 256 tokens in all (prompt 64, responses 96 each) by `with_reference`: layout,
batches, log-probabilities and the cache file included. The bare pass runs as many rows of 256
tokens in the same batches and throws its logits away. Both go in blocks of pairs in turn, one
thread; medians of the blocks' throughputs, with quartiles.

    python benchmarks/scoring.py --model stories260K
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from softpref.algorithm.policy import evaluating
from softpref.data.column_cache import ColumnCache
from softpref.models.layout import choose_layout, longest_pairs
from softpref.models.loading import load_policy
from softpref.models.reference import fingerprint_weights, with_reference
from softpref.models.scoring import Scorer

PROMPT, RESPONSE = 64, 96  # tokens
LENGTH = PROMPT + 2 * RESPONSE
BLOCK = 500  # pairs


def random_pairs(count: int, vocabulary: int) -> Dataset:
    """Return pairs of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[list[int]]:
        drawn: Tensor = torch.randint(3, vocabulary, (count, length), generator=generator)
        return drawn.tolist()

    return Dataset.from_dict(
        {"prompt_ids": ids(PROMPT), "chosen_ids": ids(RESPONSE), "rejected_ids": ids(RESPONSE)}
    )


def bare_forward(policy: nn.Module, pairs: Dataset, batch_size: int) -> None:
    """Run as many rows as there are pairs."""
    rows = torch.tensor(
        [p + c + r for p, c, r in zip(*(pairs[name] for name in pairs.column_names), strict=True)]
    )
    with evaluating(policy), torch.no_grad():
        for batch in rows.split(batch_size):
            policy(input_ids=batch, use_cache=False)


def seconds(work: Callable[[], object]) -> float:
    """Return how long it took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Time both in turn and print their throughputs."""
    parser = argparse.ArgumentParser(description="Throughput of scoring, of a bare forward pass's.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=8, help="the audit's default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = load_policy(options.model, trust_remote_code=False)
    pairs = random_pairs(options.pairs, policy.config.vocab_size)
    layout = choose_layout("auto", policy, longest_pairs(pairs))
    scorer = Scorer(policy, layout.apply(policy), batch_size=options.batch_size)
    weights = fingerprint_weights(policy)
    scored, bare = [], []
    with tempfile.TemporaryDirectory() as directory:
        cache = ColumnCache(directory)
        for start in tqdm(range(0, len(pairs), BLOCK), unit=f"{BLOCK} pairs"):
            block = pairs.select(range(start, min(start + BLOCK, len(pairs))))
            bare.append(seconds(lambda b=block: bare_forward(policy, b, options.batch_size)))
            scored.append(
                seconds(lambda b=block: with_reference(scorer, b, weights, cache, "scoring"))
            )
    print(f"layout: {layout.why}")
    rates = {"bare forward": bare, "scoring": scored}
    for name, times in rates.items():
        low, middle, high = statistics.quantiles([BLOCK / t for t in times], n=4)
        print(f"{name}: {middle:,.0f} pairs/s ({low:,.0f} to {high:,.0f}), {LENGTH} tokens each")
    ratios = [b / s for b, s in zip(bare, scored, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"scoring / bare forward: {middle:.1%} ({low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
