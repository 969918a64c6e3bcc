"""What one device needs of memory from 1B to 70B, counted, and its count against measured peaks.

    python benchmarks/memory.py              # the table
    python benchmarks/memory.py --measure    # the count against peaks of small models here

GiB of one step with activation checkpointing; numbers that train are float32. It has no shards:
what a device holds with them is in scaling.py.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from million import prepared
from scaling import train

NF4 = (4 + (8 + 32 / 256) / 64) / 8
"""Bytes of a weight: 4 bits, and for 64 of them 8 bits, which share a float32 with 255 others."""
KEEP_BUDGET = 4 * 2**30  # of --keep_budget_gib
PER_LAYER = 16, 5  # times D and F: numbers a token that one layer keeps for its backward pass


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, or of a Qwen but for its biases.

    Attributes:
        layers: how many.
        hidden: D.
        inner: F, of the feed-forward part.
        key_values: width of keys and of values.
        vocabulary: rows of the embedding.
        tied: whether the head is the embedding.
    """

    layers: int
    hidden: int
    inner: int
    key_values: int
    vocabulary: int
    tied: bool = False

    def numbers(self, rank: int | None) -> tuple[int, int]:
        """Return how many weights stay as they are and how many train: LoRA's, or all."""
        d, f, kv = self.hidden, self.inner, self.key_values
        linear = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
        weights = self.outside() + self.layers * sum(i * o for i, o in linear)
        adapter = (rank or 0) * self.layers * sum(i + o for i, o in linear)
        return (weights, adapter) if rank else (0, weights)

    def outside(self) -> int:
        """Weights outside of the linear layers that are quantized: embedding, head and norms."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + norms


def peak(
    shape: Shape, kind: str, *, taught: bool, pairs: int = 32, at_once: int = 8, tokens: int = 768,
    bytes_each: int = 2,
) -> float:  # fmt: skip
    """Return what one device needs of a step with activation checkpointing, GiB.

    Of trained numbers, in float32: weights, AdamW's moments, the gradient so far and a
    micro-batch's; with teaching also theta'. Pairs' own gradients where they fit the budget.
    Activations of one micro-batch: every layer's input, and what one layer keeps.

    Args:
        shape: the model's sizes.
        kind: full, lora or 4-bit.
        taught: MSPO with a meta-update, else DPO.
        pairs: a step.
        at_once: pairs of a micro-batch.
        tokens: of a pair, its prompt run once.
        bytes_each: of a number of the base and of activations.
    """
    base, trained = shape.numbers(None if kind == "full" else 16)
    held = float(bytes_each * base)
    if kind == "4-bit":
        held = bytes_each * shape.outside() + NF4 * (base - shape.outside())
    held += 4 * trained * (4 + taught + (pairs > at_once))
    kept = 4 * pairs * trained
    if taught and kind != "full" and kept <= KEEP_BUDGET:
        held += kept
    by_hidden, by_inner = PER_LAYER
    one_layer = by_hidden * shape.hidden + by_inner * shape.inner
    held += at_once * tokens * bytes_each * (shape.layers * shape.hidden + one_layer)
    return held / 2**30


SHAPES = {
    "1B": Shape(16, 2048, 8192, 512, 128_256, tied=True),  # Llama 3.2
    "3B": Shape(28, 3072, 8192, 1024, 128_256, tied=True),  # Llama 3.2
    "8B": Shape(32, 4096, 14_336, 1024, 128_256),  # Llama 3.1
    "14B": Shape(48, 5120, 13_824, 1024, 152_064),  # Qwen 2.5
    "32B": Shape(64, 5120, 27_648, 1024, 152_064),  # Qwen 2.5
    "70B": Shape(80, 8192, 28_672, 1024, 128_256),  # Llama 3.1
}
KINDS = ("full", "lora", "4-bit")


def memory_table() -> None:
    """Print what a device needs by size, tuning and method."""
    names = [f"{kind}, {method}" for kind in KINDS for method in ("DPO", "MSPO")]
    print(f"| model | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for name, shape in SHAPES.items():
        cells = [
            f"{peak(shape, kind, taught=taught):,.0f}" for kind in KINDS for taught in (False, True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def run(home: Path, kind: str, method: str) -> None:
    """Train two steps; print what they took, as JSON."""
    train(
        home, 4, "RssAnon", method, max_steps=2, load_in_4bit=kind == "4-bit",
        tuning="full" if kind == "full" else "lora", activation_checkpointing=True,
    )  # fmt: skip


def measure_peaks() -> None:
    """Print peaks of small models, float32, each in a fork of this process, beside the count."""
    columns = ["model", "tuning", "method", "peak, MiB", "counted, MiB", "error"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    import bitsandbytes  # noqa: F401  # no fork is to pay for these

    import softpref.training.trainer  # noqa: F401

    os.environ["WORLD_SIZE"] = "1"
    for hidden, layers in ((512, 8), (768, 12)):
        shape = Shape(layers, hidden, hidden * 43 // 16, hidden, 24)
        with prepared(hidden, layers, pairs=64) as home:
            for kind, method in product(KINDS, ("dpo", "mspo")):
                with (home / "found").open("w") as file, redirect_stdout(file):
                    fork = get_context("fork").Process(target=run, args=(home, kind, method))
                    fork.start()
                    fork.join()
                lines = (home / "found").read_text().splitlines()
                found = json.loads(next(line for line in lines if '"sizes"' in line))["peak_mib"]
                counted = 1024 * peak(
                    shape, kind, taught=method == "mspo", pairs=4, at_once=4, tokens=29,
                    bytes_each=4,
                )  # fmt: skip
                print(
                    f"| {hidden} × {layers} | {kind} | {method} | {found:,.0f} | {counted:,.0f} | "
                    f"{counted / found - 1:+.0%} |",
                    flush=True,
                )


def main() -> None:
    """Count, or measure."""
    parser = argparse.ArgumentParser(description="What one device needs of memory.")
    parser.add_argument("--measure", action="store_true", help="peaks of small models here")
    (measure_peaks if parser.parse_args().measure else memory_table)()


if __name__ == "__main__":
    main()
