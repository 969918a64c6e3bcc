"""Peak memory and throughput from 100,000 pairs to a million, of scoring and of training's start.

Synthetic pairs in a JSONL file; a Llama of one layer, random, since it is the data that is to be
looked at. Each size in a process of its own: `audit`'s scoring of all pairs, or everything `train`
does before and in its first five steps. Memory is the process's own (RssAnon), every 50 ms:
Arrow files that are mapped into it are the kernel's, which takes them back where it needs room.

    python benchmarks/million.py --sizes 100000 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLEAN = 150
WORDS = "abcdefghijkl"


def write_pairs(path: Path, count: int, seed: int) -> None:
    """Write pairs of the synthetic language's words, no two alike in number and prompt."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            symbols = draw.choices(WORDS, k=12)
            chosen, rejected = (" ".join(draw.choices(WORDS, k=6)) for _ in range(2))
            prompt = f"sort : {' '.join(symbols)} ="
            row = {"uid": f"{seed}-{i}", "prompt": prompt, "chosen": chosen, "rejected": rejected}
            if chosen != rejected:
                file.write(json.dumps(row) + "\n")


def save_model(home: Path, **sizes: int) -> None:
    """Save a random Llama with the world's tokenizer, of one layer unless told otherwise."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from softpref.world.language import make_tokenizer

    torch.manual_seed(0)
    small = dict(
        vocab_size=len(make_tokenizer()), hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    config = LlamaConfig(
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **(small | sizes)
    )
    LlamaForCausalLM(config).save_pretrained(home)
    make_tokenizer().save_pretrained(home)


@contextmanager
def prepared(hidden: int, layers: int, pairs: int = 1024) -> Iterator[Path]:
    """Save a random Llama and synthetic pairs for as long as they are needed."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        save_model(
            home / "model", vocab_size=24, hidden_size=hidden, num_hidden_layers=layers,
            intermediate_size=hidden * 43 // 16, num_attention_heads=4,
        )  # fmt: skip
        write_pairs(home / "train.jsonl", pairs, 2)
        write_pairs(home / "clean.jsonl", 64, 1)
        yield home


class PeakMemory(threading.Thread):
    """Watches this process's memory, its own (RssAnon) or with mapped files (VmRSS), MiB."""

    def __init__(self, kind: str = "RssAnon") -> None:
        super().__init__(daemon=True)
        self.kind, self.mib = kind, 0.0

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            status = Path("/proc/self/status").read_text(encoding="ascii")
            self.mib = max(self.mib, int(re.findall(rf"{self.kind}:\s*(\d+)", status)[0]) / 1024)
            time.sleep(0.05)


def work(what: str, home: Path, pairs: str) -> None:
    """Do one piece of work and print its peak memory, MiB, and its time, seconds."""
    import torch

    from softpref.auditing.scores import score_sets
    from softpref.data.sources import load_pairs
    from softpref.training.align import AlignFiles, load_sets
    from softpref.training.config import MSPOConfig
    from softpref.training.trainer import MSPOTrainer

    torch.set_num_threads(1)
    peak = PeakMemory()
    peak.start()
    config = MSPOConfig(
        output_dir=str(home / "out"), method="mspo" if what == "train" else "dpo", tuning="full",
        max_length=64, per_device_eval_batch_size=50, per_device_train_batch_size=64, max_steps=5,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    files = AlignFiles(str(home / "model"), pairs, str(home / "clean.jsonl"), None, "")
    # Once over a few pairs: what is loaded at first use is no part of the time.
    few, trusted = (load_pairs(str(home / f"{name}.jsonl")) for name in ("few", "clean"))
    score_sets(files.model, few, trusted, config)
    start = time.perf_counter()
    sets = load_sets(files, config.on_bad_row, config.seed)
    train, clean = sets.train, sets.clean
    if what == "train":
        MSPOTrainer(files.model, config, train, clean).train()
    else:
        assert clean
        score_sets(files.model, train, clean, config)
    took = time.perf_counter() - start
    print(json.dumps({"peak_mib": round(peak.mib), "seconds": round(took, 1)}))


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description="Memory and throughput by the number of pairs.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--work", nargs=3, help="for the processes it starts")
    options = parser.parse_args()
    if options.work:
        what, home, pairs = options.work
        work(what, Path(home), pairs)
        return
    print("| work | pairs | peak memory, MiB | pairs/s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        save_model(home / "model")
        write_pairs(home / "clean.jsonl", CLEAN, 1)
        write_pairs(home / "few.jsonl", CLEAN, 3)
        for size in options.sizes:
            write_pairs(home / f"{size}.jsonl", size, 2)
            for what in ("audit", "train"):
                environment = os.environ | {
                    "XDG_CACHE_HOME": str(home / f"cache-{what}"), "OMP_NUM_THREADS": "1",
                }  # fmt: skip
                done = subprocess.run(
                    [sys.executable, __file__, "--work", what, str(home),
                     str(home / f"{size}.jsonl")],
                    env=environment, stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
                found = json.loads(done.stdout.splitlines()[-1])
                rate = size / found["seconds"]
                print(f"| {what} | {size:,} | {found['peak_mib']:,} | {rate:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
