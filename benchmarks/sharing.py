"""What each of several processes forwards in commands that score, counted, and the files compared.

    python benchmarks/sharing.py                  # 1 and 2 processes here
    python benchmarks/sharing.py --processes 1 2 4

A random Llama (hidden 256, 6 layers) and a reward model of its size, over pairs of the synthetic
language. Every token that enters an embedding counts, with those of the trials that each process
makes for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PAIRS, TRUSTED, RESPONSES = 1200, 150, 1024
FILES = {
    "audit": ("audit/labels.jsonl", "audit/cleaned.jsonl"),
    "generate": ("drawn.jsonl", "drawn.jsonl.record.json"),
    "judge": ("judge/verdicts.jsonl", "judge/judge.json"),
}


@contextmanager
def counting() -> Iterator[list[int]]:
    """Count the tokens that models read."""
    from torch import nn
    from torch.nn.modules.module import register_module_forward_pre_hook

    tokens = [0]

    def count(module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            tokens[0] += given[0].numel()

    hook = register_module_forward_pre_hook(count)
    try:
        yield tokens
    finally:
        hook.remove()


def prepare(home: Path) -> None:
    """Save models, pairs, prompts and responses."""
    import torch
    from million import save_model, write_pairs
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from softpref.world.language import make_tokenizer

    sizes = dict(hidden_size=256, num_hidden_layers=6, intermediate_size=688, num_attention_heads=4)
    save_model(home / "model", **sizes)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(home / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(home / "reward")
    make_tokenizer().save_pretrained(home / "reward")
    write_pairs(home / "pairs.jsonl", PAIRS, 2)
    write_pairs(home / "clean.jsonl", TRUSTED, 1)
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    for name, side in (("ours", "chosen"), ("theirs", "rejected")):
        said = ({"prompt": row["prompt"], "response": row[side]} for row in rows[:RESPONSES])
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))


def commands() -> dict[str, Callable[[Any], None]]:
    """Return what runs a command, given the ranks, by its name."""
    from softpref.auditing.audit import run_audit
    from softpref.auditing.options import AuditOptions
    from softpref.judging.generate import run_generate
    from softpref.judging.generate_options import GenerateOptions
    from softpref.judging.judge import JudgeFiles, run_judge
    from softpref.judging.options import JudgeOptions

    audit = AuditOptions(
        model="model", data="pairs.jsonl", clean="clean.jsonl", output="audit",
        reference_cache="cache",
    )  # fmt: skip
    drawing = GenerateOptions(
        model="model", prompts="ours.jsonl", output="drawn.jsonl", temperature=1.0,
        max_new_tokens=24, limit=512,
    )  # fmt: skip
    judging = JudgeFiles("ours.jsonl", "theirs.jsonl", output="judge", reference_cache="cache")
    judge = JudgeOptions("reward_model", judge_model="reward")
    return {
        "audit": lambda ranks: run_audit(audit, ranks=ranks),
        "generate": lambda ranks: run_generate(drawing, ranks),
        "judge": lambda ranks: run_judge(judging, judge, ranks),
    }


def work(home: Path, name: str) -> None:
    """Run one command; the first process prints every process's tokens, and seconds, as JSON."""
    import torch

    from softpref.models.processes import joined_processes

    torch.set_num_threads(1)
    os.chdir(home)
    command = commands()[name]
    with joined_processes() as ranks, counting() as tokens:
        start = time.perf_counter()
        command(ranks)
        seconds = time.perf_counter() - start
        counted = [json.loads(text) for text in ranks.gather_text(json.dumps(tokens[0]))]
    if ranks.is_first:
        print(json.dumps({"tokens": counted, "seconds": seconds}))


def measured(home: Path, processes: int, name: str) -> dict[str, Any]:
    """Run a command in so many processes and return what the first of them says."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
         "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", __file__,
         "--work", str(home), name],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(next(line for line in done.stdout.splitlines() if '"tokens"' in line))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="What each process forwards, counted.")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", nargs=2, help="for the processes it starts")
    options = parser.parse_args()
    if options.work:
        work(Path(options.work[0]), options.work[1])
        return
    print("| command | processes | tokens forwarded by each | work of one / (N × largest share) | "
          "s | files |\n|---|---|---|---|---|---|")  # fmt: skip
    first: dict[str, tuple[int, bytes]] = {}
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as place:
            home = Path(place)
            prepare(home)
            for name, files in FILES.items():
                found = measured(home, processes, name)
                said = b"".join((home / file).read_bytes() for file in files)
                whole, expected = first.setdefault(name, (sum(found["tokens"]), said))
                alike = "the same bytes" if said == expected else "DIFFERENT"
                tokens = ", ".join(f"{count:,}" for count in found["tokens"])
                share = whole / processes / max(found["tokens"])
                print(f"| `{name}` | {processes} | {tokens} | {share:.1%} | "
                      f"{found['seconds']:.1f} | {alike} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
