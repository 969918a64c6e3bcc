"""How large a clean batch, and how often? Quality against m in the synthetic world.

Aligns with MSPO at 40% flips for every clean batch size and interval of meta-updates, over
development seeds, and writes win rate against SFT and label AUROC of each run as JSON lines; a run
that is in the file already is not made again.

    python benchmarks/meta_batch.py runs/meta_batch
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch

from softpref.data.noise import inject
from softpref.study import demo
from softpref.training.align import AlignFiles, align
from softpref.training.models import load_policy, load_tokenizer
from softpref.training.output import write_lines
from softpref.world.build import INFORMATIVE, make_data, sft_rows
from softpref.world.language import make_tokenizer

SEEDS = range(1000, 1005)
CELLS = ((8, 1), (16, 1), (64, 1), (8, 4), (64, 4))
"""(clean pairs per meta-update, steps between meta-updates); a step has 64 pairs."""
NOISE_RATE = 0.4


def prepare(home: Path, seed: int) -> tuple[Any, list[str]]:
    """Make the world of one seed: SFT model, flipped pairs, clean pairs; return model, prompts."""
    tokenizer = make_tokenizer()
    sft = demo.fine_tune_tiny(home / "sft", sft_rows(INFORMATIVE, seed), tokenizer, seed)
    data = make_data(INFORMATIVE, seed, demo.drawing(sft, tokenizer, seed))
    for name in ("train", "clean", "eval"):
        write_lines(home / f"{name}.jsonl", getattr(data, name))
    inject(str(home / "train.jsonl"), str(home / "noisy.jsonl"), NOISE_RATE, seed)
    return sft, data.test_prompts


def run(
    home: Path, seed: int, batch: int, every: int, prompts: list[str], baseline: list[float]
) -> dict[str, Any]:
    """Align once and return what came out."""
    output = home / f"mspo_{batch}_{every}"
    files = AlignFiles(
        str(home / "sft"), str(home / "noisy.jsonl"), str(home / "clean.jsonl"),
        str(home / "eval.jsonl"), str(output),
    )  # fmt: skip
    config = demo.alignment("mspo", seed)
    config.meta_batch_size, config.meta_every = batch, every
    start = time.monotonic()
    align(files, config)
    seconds = time.monotonic() - start
    tokenizer = load_tokenizer(str(home / "sft"), trust_remote_code=False)
    policy = load_policy(str(output), trust_remote_code=False)
    scores = demo.sampled_scores(policy, tokenizer, prompts, seed + demo.METHOD_DRAWS)
    outcome = demo.outcome_of(output, scores, baseline, demo.truth_of(str(home / "noisy.jsonl")))
    return {"seed": seed, "clean_batch": batch, "meta_every": every, "seconds": seconds} | (
        dataclasses.asdict(outcome)
    )


def main(directory: str) -> None:
    """Make every run that is not there yet."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    results = Path(directory) / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(r["seed"], r["clean_batch"], r["meta_every"]) for r in map(json.loads, lines)}
    for seed in SEEDS:
        missing = [cell for cell in CELLS if (seed, *cell) not in done]
        if not missing:
            continue
        home = Path(directory) / f"{seed}-{int(time.time())}"
        sft, prompts = prepare(home, seed)
        baseline = demo.sampled_scores(sft, make_tokenizer(), prompts, seed + demo.BASELINE_DRAWS)
        for batch, every in missing:
            result = run(home, seed, batch, every, prompts, baseline)
            with results.open("a") as out:
                out.write(json.dumps(result) + "\n")
            print(result, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
