"""How the cost of a step grows with batch, m, length, vocabulary, rank, depth and width.

One size at a time is changed from a base (random Llama), by LoRA and with all weights; seconds of
our DPO step and of our MSPO step, medians of interleaved rounds on one thread, as JSON and as a
picture.

    python benchmarks/growth.py docs/growth.json docs/growth.png
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from softpref.algorithm import MetaLearner
from softpref.algorithm.bilevel import move, mspo_step
from softpref.algorithm.gradients.jacobian import FactoredPullback, GraphPullback, kept
from softpref.algorithm.labeller import Constant
from softpref.algorithm.objective import GEOMETRIC, Objective
from softpref.algorithm.rows import PairBatch
from softpref.data.batches import make_shared_batch
from softpref.models.loading import lora_config

ROUNDS = 5
BETA, LOOKAHEAD_LR = 0.1, 1e-6
COLOURS = ("#c8553d", "#1f6f8b")


@dataclass(frozen=True)
class Size:
    """One setting: pairs a step, clean pairs, tokens, vocabulary, LoRA rank, layers, hidden size.

    Rank 0 trains all weights.
    """

    batch: int = 8
    clean: int = 1
    prompt: int = 64
    response: int = 32
    vocabulary: int = 4096
    rank: int = 16
    depth: int = 4
    width: int = 256


GROWTH: dict[str, tuple[int, ...]] = {
    "batch": (2, 4, 8, 16, 32),
    "clean": (1, 2, 4, 8),
    "prompt": (16, 64, 256, 512),
    "response": (16, 32, 64, 128),
    "vocabulary": (1024, 4096, 16384, 65536),
    "rank": (2, 8, 16, 64),
    "depth": (2, 4, 8),
    "width": (128, 256, 512, 1024),
}
UNITS = {
    "batch": "pairs a step", "clean": "clean pairs a step (of 8)", "prompt": "prompt, tokens",
    "response": "each response, tokens", "vocabulary": "vocabulary, tokens", "rank": "LoRA rank",
    "depth": "layers", "width": "hidden size",
}  # fmt: skip


def policy_of(size: Size) -> nn.Module:
    """Return a random Llama, with LoRA on all its linear layers but the head unless rank is 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.width * 43 // 16,
        num_hidden_layers=size.depth,
        num_attention_heads=4,
        max_position_embeddings=2048,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    return (get_peft_model(model, lora_config(rank=size.rank)) if size.rank else model).train()


def batch_of(size: Size, count: int, random: Random) -> PairBatch:
    """Return random pairs of exactly the given lengths."""

    def ids(length: int) -> list[int]:
        return [random.randrange(size.vocabulary) for _ in range(length)]

    pairs = [
        {
            "prompt_ids": ids(size.prompt),
            "chosen_ids": ids(size.response),
            "rejected_ids": ids(size.response),
            "ref_chosen_logp": -8.0 * size.response,
            "ref_rejected_logp": -8.0 * size.response,
        }
        for _ in range(count)
    ]
    return make_shared_batch(pairs, "scored", hidden_size=size.width)


def measure(size: Size) -> dict[str, Any]:
    """Return median seconds of both steps, and the median and quartiles of their ratio."""
    policy, meta_learner, random = policy_of(size), MetaLearner(), Random(0)
    optimizer = torch.optim.AdamW(meta_learner.parameters(), lr=1e-4)
    noisy, clean = batch_of(size, size.batch, random), batch_of(size, size.clean, random)

    def dpo() -> None:
        jacobians = [GraphPullback(policy, noisy, "response")]
        move(jacobians, Constant(1.0), Objective(GEOMETRIC, BETA), pairs=size.batch)

    def mspo() -> None:
        jacobians = [kept(policy, noisy, "response")]
        mspo_step(
            policy, meta_learner, optimizer, jacobians, [clean], Objective(GEOMETRIC, BETA),
            LOOKAHEAD_LR, FactoredPullback,
        )  # fmt: skip

    seconds: dict[str, list[float]] = {"dpo": [], "mspo": []}
    for turn in range(ROUNDS + 1):
        for name, step in (("dpo", dpo), ("mspo", mspo)):
            spent = _timed(step)
            if turn:  # the first round warms up
                seconds[name].append(spent)
    ratios = [m / d for m, d in zip(seconds["mspo"], seconds["dpo"], strict=True)]
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return {name: statistics.median(values) for name, values in seconds.items()} | {
        "mspo_vs_dpo": {"median": median, "q1": q1, "q3": q3}
    }


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def draw(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Draw seconds of our DPO step against each size, and beneath it MSPO / DPO with quartiles."""
    figure = Figure(figsize=(15, 11), layout="constrained")
    axes = figure.subplots(4, 4, height_ratios=[3, 2, 3, 2])
    for place, name in enumerate(GROWTH):
        top, column = 2 * (place // 4), place % 4
        above, below = axes[top][column], axes[top + 1][column]
        for (tuning, by_size), colour in zip(results.items(), COLOURS, strict=True):
            points = by_size.get(name, [])
            x, ratio = [point[name] for point in points], [p["mspo_vs_dpo"] for p in points]
            above.plot(x, [p["mspo"] for p in points], "o-", color=colour, label=f"MSPO, {tuning}")
            above.plot(x, [p["dpo"] for p in points], "o--", color=colour, label=f"DPO, {tuning}")
            below.plot(x, [r["median"] for r in ratio], "o-", color=colour)
            quartiles = [r["q1"] for r in ratio], [r["q3"] for r in ratio]
            below.fill_between(x, *quartiles, color=colour, alpha=0.2)
        above.set(xscale="log", ylim=(0, None), ylabel="seconds a step")
        below.set(xscale="log", xlabel=UNITS[name], ylabel="MSPO / DPO", ylim=(0.9, None))
        for panel in (above, below):
            panel.set_xticks(GROWTH[name], [str(value) for value in GROWTH[name]])
            panel.minorticks_off()
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(numbers: str, picture: str) -> None:
    """Measure every setting, write the numbers and the picture."""
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for tuning, base in (("LoRA", Size()), ("full", Size(rank=0))):
        results[tuning] = {}
        for name, values in GROWTH.items():
            if name == "rank" and not base.rank:
                continue
            sizes = [dataclasses.replace(base, **{name: value}) for value in values]
            results[tuning][name] = [
                dataclasses.asdict(size) | measure(size)
                for size in tqdm(sizes, f"{tuning}, {name}", leave=False)
            ]
    Path(numbers).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
