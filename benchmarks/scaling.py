"""What a step moves and computes on W devices, counted, measured on CPUs, and predicted for GPUs.

    python benchmarks/scaling.py              # the tables for 8B and 70B
    python benchmarks/scaling.py --measure    # 1, 2 and 4 processes here: bytes counted, times
    python benchmarks/scaling.py --shards     # the same with the base whole and in shards, memory

Bytes are what each process hands to torch.distributed in one taught step; on the wire a ring moves
2 (W - 1) / W of a sum's and (W - 1) times a gathered part. FLOPs are 2 a weight and token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTEGER = 8  # bytes of a count
COLUMNS = 10  # a pair's measurements, label and place, gathered as float64
GATHERED = 8
TOTALS = 5  # pairs of the three moves, of dL/ds, and the question whether SIGTERM has come
FLAGS = 4  # whether three sums of gradients, and the weights, are finite in all shards
GATHERINGS = {"graph": 7, "recompute": 9}
"""Of all weights in one taught step: a forward pass and three backward passes, or three of both;
one of each of clean pairs; and the clean gradient, once."""
META_LEARNER = 16_897  # weights of 1 -> 128 -> 128 -> 1


@dataclass(frozen=True)
class Step:
    """One taught step.

    Attributes:
        weights: of the policy.
        trained: how many of them are trained.
        head: of the last norm and the head, which stay gathered once they are.
        embedding: of the embedding.
        pairs: noisy pairs, over all processes.
        clean_share: m, clean pairs over noisy ones.
        tokens: of a pair, its prompt run once.
        layers: of the policy, and `hidden` its width, for attention.
        hidden: D.
        trained_bytes: of a trained number.
        meta_learner: weights of V, in float32.
    """

    weights: int
    trained: int
    pairs: int
    head: int = 0
    embedding: int = 0
    clean_share: float = 1 / 8
    tokens: int = 768
    layers: int = 0
    hidden: int = 0
    trained_bytes: int = 4
    meta_learner: int = META_LEARNER

    def summed(self) -> int:
        """Bytes a process sums: three gradients with their losses, phi's, and the counts."""
        gradients = 3 * (self.trained + 1) * self.trained_bytes
        return gradients + 4 * self.meta_learner + TOTALS * INTEGER

    def gathered(self, processes: int) -> int:
        """Bytes a process gives to be gathered: its pairs' rows, padded alike, and their count."""
        return -(-self.pairs // processes) * COLUMNS * GATHERED + INTEGER

    def wire(self, processes: int) -> float:
        """Bytes that leave a device in one step."""
        if processes == 1:
            return 0.0
        others = processes - 1
        return 2 * others / processes * self.summed() + others * self.gathered(processes)

    def shards(self, processes: int, bytes_each: int = 2) -> int:
        """Bytes a process gives to be gathered of a base in shards, if these come out even.

        In each forward and each backward pass of noisy and of clean pairs, one micro-batch each,
        with engine kept.
        """
        return bytes_each * 4 * (self.weights - self.trained - self.head) // processes

    def summed_in_shards(self) -> int:
        """Bytes a process sums where all weights are in shards: losses, phi's gradient, counts."""
        return 3 * self.trained_bytes + 4 * self.meta_learner + TOTALS * INTEGER + FLAGS * 4

    def all_shards(self, processes: int, engine: str = "recompute") -> int:
        """Bytes a process gives to be gathered of all weights in shards, if these come out even.

        With one micro-batch of noisy and one of clean pairs. The product with the clean gradient
        goes back no further than the embedding's output; only from a new graph torch gathers ahead.
        """
        gathered = GATHERINGS[engine] * self.trained - (self.embedding if engine == "graph" else 0)
        return gathered * self.trained_bytes // processes

    def reduced(self) -> int:
        """Bytes of gradients a process gives to be summed in shards: three times all weights."""
        return 3 * self.trained * self.trained_bytes

    def flops(self, *, lora: bool) -> float:
        """FLOPs of a step on all devices: 2F(1 + m) with LoRA, else by graphs 5F + 3mF."""
        per_token = 2 * self.weights + 4 * self.layers * self.hidden * self.tokens
        forward = per_token * self.tokens * self.pairs
        return forward * (2 + 2 * self.clean_share if lora else 5 + 3 * self.clean_share)


MODELS = {
    "7B, full": (
        Step(7_241_732_096, 7_241_732_096, 64, 131_076_096, layers=32, hidden=4096),
        False,
    ),
    "8B, LoRA": (Step(8_072_000_000, 41_943_040, 64, 525_340_672, layers=32, hidden=4096), True),
    "8B, full": (
        Step(8_030_000_000, 8_030_000_000, 64, 525_340_672, layers=32, hidden=4096),
        False,
    ),
    "70B, LoRA": (
        Step(70_807_000_000, 207_093_760, 64, 1_050_681_344, layers=80, hidden=8192),
        True,
    ),
    "70B, full": (
        Step(70_600_000_000, 70_600_000_000, 64, 1_050_681_344, layers=80, hidden=8192),
        False,
    ),
}
DEVICES = (1, 2, 4, 8, 16, 32, 64)
FLOPS_A_SECOND = 400e12  # of a device, as reached
ONE_MACHINE, BYTES_A_SECOND_INSIDE, BYTES_A_SECOND_BETWEEN = 8, 300e9, 40e9


def seconds(step: Step, processes: int, *, lora: bool) -> tuple[float, float, float]:
    """Return the time of the sums, of the arithmetic, and of gathering shards, s.

    With all weights in shards gathering has the place of the sums of gradients.
    """
    speed = BYTES_A_SECOND_INSIDE if processes <= ONE_MACHINE else BYTES_A_SECOND_BETWEEN
    gathering = (processes - 1) * step.shards(processes) / speed if lora else 0.0
    if not lora:
        gathering = shard_traffic(step, processes) / speed
    arithmetic = step.flops(lora=lora) / processes / FLOPS_A_SECOND
    return step.wire(processes) / speed, arithmetic, gathering


def shard_traffic(step: Step, processes: int) -> float:
    """Return the bytes that leave a device in one step with all weights in shards."""
    others = processes - 1
    return others * step.all_shards(processes) + others / processes * step.reduced()


def memory(step: Step, processes: int = 1) -> float:
    """Return what a device holds beside activations, GiB: weights, gradients, AdamW, theta'.

    A base in shards has two layers and the head gathered at a time, and beside it engine kept has
    its pairs' own gradients. All weights in shards have two layers, embedding and head gathered,
    and as much of gradients on their way.
    """
    if processes > 1 and step.trained == step.weights:
        in_layers = step.weights - 2 * step.head
        whole = 2 * (2 * in_layers / step.layers + 2 * step.head)
        return (6 * step.trained / processes + whole) * step.trained_bytes / 2**30
    base = 2 * (step.weights - step.trained if step.trained < step.weights else 0)
    own = 6
    if processes > 1:
        base = base / processes + 2 * step.head + 2 * base / step.layers
        own += -(-step.pairs // processes)
    return (base + step.trained * step.trained_bytes * own) / 2**30


def predict() -> None:
    """Print the tables."""
    for name, (step, lora) in MODELS.items():
        print(f"\n{name}: {memory(step):,.0f} GiB a device beside activations\n")
        columns = ["devices", "GB on the wire a device", "PFLOPs a device", "sums, s",
                   "arithmetic, s", "efficiency"]  # fmt: skip
        if lora:
            columns += ["base in shards: GiB a device", "GB gathered", "gathering, s"]
        else:
            columns += ["all in shards: GiB a device", "GB gathered and reduced", "s"]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for devices in DEVICES:
            sums, work, gathering = seconds(step, devices, lora=lora)
            cells = [
                f"{devices}", f"{step.wire(devices) / 1e9:.2f}",
                f"{step.flops(lora=lora) / devices / 1e15:.2f}", f"{sums:.3f}", f"{work:.3f}",
                f"{work / (sums + work):.0%}",
            ]  # fmt: skip
            if lora and devices > 1:
                gathered = (devices - 1) * step.shards(devices) / 1e9
                cells += [f"{memory(step, devices):.0f}", f"{gathered:.0f}", f"{gathering:.3f}"]
            elif devices > 1:
                moved = shard_traffic(step, devices) / 1e9
                cells += [f"{memory(step, devices):.0f}", f"{moved:.0f}", f"{gathering:.3f}"]
            print(f"| {' | '.join(cells)} |" + " | | |" * (devices == 1))


class Counter:
    """Counts what this process hands to torch.distributed, bytes, by kind."""

    def __init__(self) -> None:
        from torch import distributed
        from torch.distributed.tensor import DTensor

        self.bytes = {"summed": 0, "gathered": 0, "shards": 0, "reduced": 0}
        reduce, gather = distributed.all_reduce, distributed.all_gather
        # Shards need a torch that has this name.
        gather_shards = getattr(distributed, "all_gather_single", None)
        reduce_shards = getattr(distributed, "reduce_scatter_single", None)
        full_tensor = DTensor.full_tensor

        def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.bytes["summed"] += tensor.nbytes
            return reduce(tensor, *args, **kwargs)

        def all_gather(parts: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.bytes["gathered"] += tensor.nbytes
            return gather(parts, tensor, *args, **kwargs)

        def all_gather_single(whole: Any, shard: Any, *args: Any, **kwargs: Any) -> Any:
            assert gather_shards is not None
            self.bytes["shards"] += shard.nbytes
            return gather_shards(whole, shard, *args, **kwargs)

        def reduce_scatter_single(**kwargs: Any) -> Any:
            assert reduce_shards is not None
            self.bytes["reduced"] += kwargs["input"].nbytes
            return reduce_shards(**kwargs)

        def gathered(shards: Any, **kwargs: Any) -> Any:
            if any(placement.is_shard() for placement in shards.placements):
                self.bytes["shards"] += shards.detach().to_local().nbytes
            return full_tensor(shards, **kwargs)

        distributed.all_reduce, distributed.all_gather = all_reduce, all_gather
        distributed.all_gather_single = all_gather_single
        distributed.reduce_scatter_single = reduce_scatter_single
        DTensor.full_tensor = gathered


STEPS, WARM = 16, 4


def train(
    home: Path, pairs_a_process: int, memory_kind: str, method: str = "mspo", **options: Any
) -> None:
    """Train a few steps; print sizes, peak memory, and bytes and seconds of each step, as JSON.

    Args:
        home: holds the model and the pairs.
        pairs_a_process: a step.
        memory_kind: whose peak is taken, by Linux' name.
        method: mspo or dpo.
        options: more of the run.
    """
    import torch
    from million import PeakMemory
    from transformers import TrainerCallback

    from softpref.data.sources import load_pairs
    from softpref.training.config import MSPOConfig
    from softpref.training.trainer import MSPOTrainer

    torch.set_num_threads(1)
    peak = PeakMemory(memory_kind)
    peak.start()
    processes = int(os.environ["WORLD_SIZE"])
    meta_batch_size = max(1, pairs_a_process * processes // 8)
    own = {"meta_every": 1, "meta_batch_size": meta_batch_size} if method == "mspo" else {}
    config = MSPOConfig(
        output_dir=str(home / "out"), method=method, use_cpu=True,
        per_device_train_batch_size=pairs_a_process, gradient_accumulation_steps=1,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
        reference_cache=str(home / "cache"), **own, **options,
    )  # fmt: skip
    sets = [load_pairs(str(home / f"{name}.jsonl")) for name in ("train", "clean")]
    at_start = peak.mib
    trainer = MSPOTrainer(str(home / "model"), config, *sets)
    counter = Counter()
    seen: list[dict[str, float]] = []

    class Note(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append({"at": time.perf_counter(), **counter.bytes})

    trainer.add_callback(Note())
    trainer.train()
    if trainer.ranks.is_first:
        sizes = {
            "weights": sum(p.numel() for p in trainer.policy.parameters()),
            "trained": sum(p.numel() for p in trainer.policy.parameters() if p.requires_grad),
            "head": sum(p.numel() for name, p in trainer.policy.named_parameters()
                        if ".layers." not in name and ".embed_tokens." not in name),
        }  # fmt: skip
        v = 0
        if trainer.teacher:
            v = sum(p.numel() for p in trainer.teacher.meta_learner.parameters())
        steps = [
            {name: after[name] - before[name] for name in after}
            for before, after in zip(seen[WARM:], seen[WARM + 1 :], strict=False)
        ]
        more = {"meta_learner": v, "layers": trainer.policy.config.num_hidden_layers}
        found = {"sizes": sizes | more, "peak_mib": peak.mib - at_start, "steps": steps}
        print(json.dumps(found), flush=True)


def measured(home: Path, processes: int, pairs_a_process: int, base: str) -> dict[str, Any]:
    """Run the work in so many processes and return what the first of them says."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
         "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", __file__,
         "--work", str(home), str(pairs_a_process), base],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(next(line for line in done.stdout.splitlines() if '"sizes"' in line))


def spread(found: dict[str, Any]) -> tuple[float, str]:
    """Return the median time of a step, s, and as text with its quartiles."""
    low, mid, high = statistics.quantiles([step["at"] for step in found["steps"]], n=4)
    return mid, f"{mid:.3f} ({low:.3f} to {high:.3f})"


def measure() -> None:
    """Print bytes counted against bytes predicted, and times of 1, 2 and 4 processes."""
    from million import prepared

    print(
        "| scaling | processes | pairs a step | summed, bytes (predicted) | gathered, bytes "
        "(predicted) | s a step, median (quartiles) | efficiency |\n|---|---|---|---|---|---|---|"
    )
    with prepared(hidden=256, layers=6) as home:
        for kind, pairs in (("strong", lambda n: 32 // n), ("weak", lambda n: 16)):
            first = None
            for processes in (1, 2, 4):
                found = measured(home, processes, pairs(processes), "whole")
                step = Step(pairs=pairs(processes) * processes, **found["sizes"])
                counts = found["steps"][-1]
                mid, time_a_step = spread(found)
                first = first or mid
                ideal = first / processes if kind == "strong" else first
                expected = step.summed(), step.gathered(processes)
                print(
                    f"| {kind} | {processes} | {step.pairs} | "
                    f"{counts['summed']:,} ({expected[0] if processes > 1 else 0:,}) | "
                    f"{counts['gathered']:,} ({expected[1] if processes > 1 else 0:,}) | "
                    f"{time_a_step} | {ideal / mid:.0%} |",
                    flush=True,
                )


def measure_shards() -> None:
    """Print bytes gathered and predicted, time and memory, with the base whole and sharded."""
    from million import prepared

    print(
        "| base | processes | given to be gathered, bytes (predicted) | s a step, median "
        "(quartiles) | MiB a process more than at its start, peak |\n|---|---|---|---|---|"
    )
    with prepared(hidden=768, layers=12) as home:
        # What is freed goes back at once, so that peaks are what was needed; it costs time.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        for base, processes in (
            ("whole", 1), ("whole", 2), ("shards", 2), ("whole", 4), ("shards", 4),
        ):  # fmt: skip
            found = measured(home, processes, 4, base)
            step = Step(pairs=4 * processes, **found["sizes"])
            predicted = step.shards(processes, bytes_each=4) if base == "shards" else 0
            _, time_a_step = spread(found)
            print(
                f"| {base} | {processes} | {found['steps'][-1]['shards']:,} ({predicted:,}) | "
                f"{time_a_step} | {found['peak_mib']:,.0f} |",
                flush=True,
            )


def main() -> None:
    """Foretell, or measure."""
    parser = argparse.ArgumentParser(description="What a step moves and computes on W devices.")
    parser.add_argument("--measure", action="store_true", help="run 1, 2 and 4 processes here")
    parser.add_argument("--shards", action="store_true", help="the same, base whole and in shards")
    parser.add_argument("--work", nargs=3, help="for the processes it starts")
    options = parser.parse_args()
    if options.work:
        home, pairs, base = options.work
        train(Path(home), int(pairs), "VmRSS", max_steps=STEPS, shard=base == "shards")
    elif options.shards:
        measure_shards()
    elif options.measure:
        measure()
    else:
        predict()


if __name__ == "__main__":
    main()
