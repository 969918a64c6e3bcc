"""How large a clean batch, and how often? Quality against m in the synthetic world.

Aligns with MSPO at 40% flips for every clean batch size and interval of meta-updates, over
development seeds, and writes win rate against SFT and label AUROC of each run as JSON lines; a run
that is in the file already is not made again.

    python benchmarks/meta_batch.py runs/meta_batch
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch

from softpref.data.noise import inject
from softpref.study.evaluators import LabelQuality
from softpref.training.align import AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.world.build import INFORMATIVE
from softpref.world.checker import Checker
from softpref.world.prepare import PreparedWorld, alignment, prepare_world

SEEDS = range(1000, 1005)
CELLS = ((8, 1), (16, 1), (64, 1), (8, 4), (64, 4))
"""(clean pairs per meta-update, steps between meta-updates); a step has 64 pairs."""
NOISE_RATE = 0.4


def run(world: PreparedWorld, noisy: str, batch: int, every: int) -> dict[str, Any]:
    """Align once and return what came out."""
    output = world.home / f"mspo_{batch}_{every}"
    files = AlignFiles(world.sft, noisy, world.pairs("clean"), world.pairs("eval"), str(output))
    clean = {"meta_batch_size": batch, "meta_every": every}
    start = time.monotonic()
    align(files, MSPOConfig(**alignment("mspo", world.seed) | clean))
    seconds = time.monotonic() - start
    asked = {"seed": world.seed, "clean_batch": batch, "meta_every": every, "seconds": seconds}
    return asked | Checker(world)(output) | LabelQuality(noisy)(output)


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
        world = prepare_world(INFORMATIVE, seed, Path(directory) / f"{seed}-{int(time.time())}")
        noisy = str(world.home / "noisy.jsonl")
        inject(world.pairs("train"), noisy, NOISE_RATE, seed)
        for batch, every in missing:
            result = run(world, noisy, batch, every)
            with results.open("a") as out:
                out.write(json.dumps(result) + "\n")
            print(result, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
