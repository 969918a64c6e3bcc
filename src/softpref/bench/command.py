"""One whole command in a process of its own, with the time of each of its phases.

Run as a module, this is that process: it reads a JSON request from its first argument, runs the
command, and writes the phases to the file that the request names. Imports are timed too, so
nothing but the standard library is imported before they are.
"""

from __future__ import annotations

import functools
import json
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

PHASES = (
    "imports",
    "loading",
    "reading",
    "reference",
    "layout and engine",
    "steps",
    "labelling",
    "saving",
    "other",
)
_START = "softpref.training.start"
_TRAINER = "softpref.training.trainer"
_OURS = (
    ("loading", _START, "load_to_train"),
    ("loading", _START, "tokenizer_of"),
    ("loading", _START, "make_trainable"),
    ("loading", _START, "require_fit"),
    ("loading", _START, "fingerprint_weights"),
    ("reading", "softpref.training.align", "load_sets"),
    ("reading", _START, "prepare"),
    ("reference", _START, "_with_reference"),
    ("reference", _START, "with_evidence"),
    ("layout and engine", _START, "choose_layout"),
    ("layout and engine", _START, "layout_with_adapter"),
    ("layout and engine", _START, "_engine_of"),
    ("steps", _TRAINER, "MSPOTrainer.train"),
    ("labelling", _TRAINER, "MSPOTrainer.label_pairs"),
    ("saving", _TRAINER, "MSPOTrainer.save_model"),
)
_TRL = "trl.trainer.dpo_trainer"
_THEIRS = (
    ("loading", _TRL, "create_model_from_path"),
    ("reading", _TRL, "DPOTrainer._prepare_dataset"),
    ("reference", _TRL, "DPOTrainer._precompute_ref_logps"),
    ("steps", _TRL, "DPOTrainer.train"),
    ("saving", _TRL, "DPOTrainer.save_model"),
)


class Stopwatch:
    """Adds up seconds, wall and processor, by phase; an inner phase's are not its outer one's."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, (0.0, 0.0))
        self._phases = ["other"]
        self._last = time.perf_counter(), 0.0  # what the interpreter took is counted

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Count the block's time as that of a phase."""
        self.mark()
        self._phases.append(phase)
        try:
            yield
        finally:
            self.mark()
            self._phases.pop()

    def mark(self) -> None:
        """Add the time since the last mark to the phase that is on."""
        now, phase = (time.perf_counter(), time.process_time()), self._phases[-1]
        wall, processor = self.seconds[phase]
        self.seconds[phase] = wall + now[0] - self._last[0], processor + now[1] - self._last[1]
        self._last = now

    def time_calls(self, calls: Sequence[tuple[str, str, str]]) -> None:
        """Count calls of functions as phases: (phase, module, name in it)."""
        for phase, module, name in calls:
            *owners, attribute = name.split(".")
            owner = functools.reduce(getattr, owners, import_module(module))
            setattr(owner, attribute, self._timed(phase, getattr(owner, attribute)))

    def _timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.timing(phase):
                return call(*arguments, **named)

        return timed


def run_ours(arguments: Sequence[str], watch: Stopwatch) -> None:
    """Run `softpref` with these arguments."""
    with watch.timing("imports"):
        watch.time_calls(_OURS)
    sys.argv[1:] = arguments
    runpy.run_module("softpref", run_name="__main__")


def run_trl(request: dict[str, Any], watch: Stopwatch) -> None:
    """Train by TRL's DPOTrainer and save, as its users do: pairs from a file, LoRA, a model's path.

    Args:
        request: `model` and `train`, their paths; `lora`, arguments of `LoraConfig`; `options` of
            `DPOConfig`; whether to use the `response_only_head`, which TRL switches on on GPUs.
        watch: times the phases.
    """
    with watch.timing("imports"):
        from datasets import load_dataset
        from peft import LoraConfig
        from trl.trainer import utils as heads
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        watch.time_calls(_THEIRS)
    if request["response_only_head"] and hasattr(heads, "_use_triton"):
        heads._use_triton = lambda device: True
    with watch.timing("reading"):
        pairs = load_dataset("json", data_files=request["train"], split="train")
    trainer = DPOTrainer(
        request["model"],
        args=DPOConfig(**request["options"]),
        train_dataset=pairs,
        peft_config=LoraConfig(**request["lora"]),
    )
    trainer.train()
    trainer.save_model()


def _main(request: dict[str, Any]) -> None:
    watch = Stopwatch()
    if "arguments" in request:
        run_ours(request["arguments"], watch)
    else:
        run_trl(request, watch)
    watch.mark()
    Path(request["phases"]).write_text(json.dumps(watch.seconds), encoding="utf-8")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
