"""`softpref env`: versions, devices, and how `train` would run here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, cast

import torch
from datasets import Dataset

from softpref.models.layout import choose_layout
from softpref.models.loading import Tuning, load_to_train, make_trainable, on_accelerator
from softpref.options import option
from softpref.terminal import say
from softpref.training.engines import engine_for
from softpref.training.finished import PACKAGES
from softpref.training.recipes import MOST_MICRO_BATCHES

PROBE = {"prompt_ids": 24, "chosen_ids": 12, "rejected_ids": 9}
MICRO_BATCH = 8
PAIRS = 4
"""Pairs that a model is tried on, and the least tokens of each part of one."""


@dataclass
class EnvOptions:
    """Options of `softpref env`."""

    model: str | None = option(
        "A model to try: says which layout and engine train would choose.", metavar="DIR|ID"
    )
    tuning: Tuning = option("How it would be trained.", "lora")
    accelerate: Literal["one_gpu", "gpus", "machines"] | None = option(
        "Print a ready config of accelerate and nothing else."
    )
    trust_remote_code: bool = option("Run code that comes with the model.", False)


def run_env(options: EnvOptions) -> None:
    """Print what is here, or a config of accelerate.

    Raises:
        UsageError: the model cannot be loaded.
    """
    if options.accelerate:
        print(accelerate_config(options.accelerate), end="")
        return
    for name, value in (*_versions(), *_devices(), *_ways(), *_trial(options)):
        say(f"{name:<14} {value}")


def accelerate_config(name: str) -> str:
    """Return a ready config of accelerate, by name."""
    path = files("softpref.training") / "accelerate" / f"{name}.yaml"
    return path.read_text(encoding="utf-8")


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, importlib.metadata.version(package)


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    if not torch.accelerator.is_available():
        yield "accelerator", "none: train runs on the CPU"
        return
    kind = torch.accelerator.current_accelerator()
    for i in range(torch.accelerator.device_count()):
        what = str(kind)
        if kind is not None and kind.type == "cuda":
            found = torch.cuda.get_device_properties(i)
            what = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
        yield f"accelerator {i}", what


def _ways() -> Iterator[tuple[str, str]]:
    if torch.cuda.is_available():
        yield "attention", "FlexAttention for shared prompts where a trial agrees, else a mask"
        yield "processes", "accelerate launch --config_file gpus.yaml -m softpref.cli train ..."
        yield "", "(softpref env --accelerate gpus > gpus.yaml), by NCCL"
    else:
        yield "attention", "scaled dot products with a mask (FlexAttention needs CUDA)"
        yield "processes", "torchrun --nproc_per_node N -m softpref.cli train ..., by gloo"
        yield "", "(on a CPU accelerate launch starts one process, whatever its config says)"
    yield "", "for a model too large for one device, with --shard true"


def _trial(options: EnvOptions) -> Iterator[tuple[str, str]]:
    if options.model is None:
        yield "engine", "by trial and memory; --model DIR tries a model"
        return
    trusted_code = options.trust_remote_code
    policy = load_to_train(
        options.model, options.tuning, torch.float32, 1, None, trust_remote_code=trusted_code
    )
    policy = on_accelerator(make_trainable(policy, options.tuning, None))
    draw = torch.Generator().manual_seed(0)
    vocabulary = cast(Any, policy).get_input_embeddings().num_embeddings

    def ids(tokens: int) -> list[int]:
        return torch.randint(vocabulary, (tokens,), generator=draw).tolist()

    probe = Dataset.from_list(
        [
            {part: ids(tokens + i) for part, tokens in PROBE.items()}
            | {"ref_chosen_logp": 0.0, "ref_rejected_logp": 0.0}
            for i in range(PAIRS)
        ]
    )
    layout = choose_layout("auto", policy, probe.to_list())
    yield "layout", layout.why
    size = MICRO_BATCH * MOST_MICRO_BATCHES, MOST_MICRO_BATCHES  # as recommended
    yield "engine", engine_for(policy, probe, layout.apply(policy), *size).why
    yield "", f"tried on {PAIRS} pairs of {sum(PROBE.values())} tokens and a few more"
