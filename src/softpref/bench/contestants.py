"""The contestants of `softpref bench`: trainers, each ready to do one training step.

TRL's trainers are called through their public methods, so timings are those of its users.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from transformers import Trainer

from softpref.bench.workload import Workload
from softpref.models.loading import Tuning, lora_config
from softpref.models.recompute import checkpoint_activations
from softpref.training.config import MSPOConfig
from softpref.training.trainer import MSPOTrainer

Name = Literal[
    "trl_default", "trl_best", "dpo", "mspo_m1/8", "mspo_m1", "double_backward",
    "dpo_checkpointed", "graph_checkpointed", "recompute_checkpointed",
]  # fmt: skip
NAMES: tuple[Name, ...] = get_args(Name)
DPOS: tuple[Name, ...] = ("trl_default", "trl_best", "dpo")
# The others run on the first shape only.
ON_EVERY_SHAPE: tuple[Name, ...] = (*DPOS, "mspo_m1/8", "mspo_m1", "double_backward")

# m: the size of MSPO's clean batch over the size of the noisy batch.
M_FEW, M_ALL = 0.125, 1.0
MSPO: dict[float, Name] = {M_FEW: "mspo_m1/8", M_ALL: "mspo_m1"}
LOOKAHEAD_LR = 1e-6


class Contestant:
    """A trainer in the state in which `train` does its first step.

    Attributes:
        trainer: a trainer of transformers, TRL or softpref.
        model: the model after the trainer's accelerator has prepared it.
    """

    def __init__(self, trainer: Trainer, workload: Workload) -> None:
        args, model = trainer.args, trainer.model
        assert isinstance(model, nn.Module)
        if args.gradient_checkpointing:  # whichever name transformers has for it
            checkpoint_activations(model)
        trainer.create_optimizer_and_scheduler(1)  # no step is taken with it
        trainer.current_gradient_accumulation_steps = 1
        self.trainer = trainer
        self.model: nn.Module = trainer.accelerator.prepare_model(model)
        rows: list[Any] = list(trainer.train_dataset)  # type: ignore[arg-type]
        self._batches = [
            trainer.data_collator(rows[i : i + workload.pairs])
            for i in range(0, len(rows), workload.pairs)
        ]

    def clear(self) -> None:
        """Drop the gradients of the previous step."""
        self.model.zero_grad(set_to_none=True)

    def step(self, batch: int) -> Tensor:
        """Do one training step without the optimizer on batch `batch`, modulo their number.

        Returns:
            The loss, shape ().
        """
        inputs = self._batches[batch % len(self._batches)]
        device = self.trainer.args.device
        window, items = self.trainer.get_batch_samples(iter([inputs]), 1, device)
        return self.trainer.training_step(self.model, window[-1], items)


class ResponseOnlyContestant(Contestant):
    """TRL with its head for responses only, which it enables on GPUs only."""

    def step(self, batch: int) -> Tensor:
        """Do one training step; see `Contestant.step`."""
        with _response_only_head():
            return super().step(batch)


def make_contestant(name: Name, workload: Workload, tuning: Tuning, home: Path) -> Contestant:
    """Return a contestant, which writes only to `home` and prints nothing."""
    with _quiet():
        match name:
            case "trl_default":
                # The reference of full fine-tuning, which TRL would load from the model's path.
                reference = workload.model(tuning) if tuning == "full" else None
                return Contestant(_trl(workload, tuning, home, reference), workload)
            case "trl_best":
                best = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
                trainer = _trl(workload, tuning, home, reference=None, **best)
                return ResponseOnlyContestant(trainer, workload)
            case "dpo":
                return Contestant(_ours(workload, tuning, home, method="dpo"), workload)
            case "mspo_m1/8":
                return Contestant(_mspo(workload, tuning, home, M_FEW, "auto"), workload)
            case "mspo_m1":
                return Contestant(_mspo(workload, tuning, home, M_ALL, "auto"), workload)
            case "double_backward":
                return Contestant(_mspo(workload, tuning, home, M_FEW, "double_backward"), workload)
            case "dpo_checkpointed":
                trainer = _ours(workload, tuning, home, method="dpo", activation_checkpointing=True)
                return Contestant(trainer, workload)
            case "graph_checkpointed" | "recompute_checkpointed":
                engine = name.removesuffix("_checkpointed")
                trainer = _mspo(
                    workload, tuning, home, M_FEW, engine, activation_checkpointing=True
                )
                return Contestant(trainer, workload)


def has_response_only_head() -> bool:
    """Return whether the installed TRL has a head for responses only."""
    return hasattr(_heads_module(), "_use_triton")


@contextmanager
def _response_only_head() -> Iterator[None]:
    if not has_response_only_head():
        yield
        return
    # Only the head reads this name; TRL's kernels have their own check for Triton.
    module = _heads_module()
    on_device = module._use_triton
    module._use_triton = lambda device: True
    try:
        yield
    finally:
        module._use_triton = on_device


def _heads_module() -> Any:
    return import_module("trl.trainer.utils")


def _trl(workload: Workload, tuning: Tuning, home: Path, reference: Any, **options: Any) -> Trainer:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    return DPOTrainer(
        workload.model(tuning),
        reference,
        args=DPOConfig(**_common(workload, home), **options),
        train_dataset=workload.train_pairs(),
        processing_class=workload.tokenizer(),
        peft_config=lora_config() if tuning == "lora" else None,
    )


def _mspo(
    workload: Workload, tuning: Tuning, home: Path, m: float, engine: str, **options: Any
) -> Trainer:
    # Noise rate and warm start are not part of a step, so neither is computed.
    given = {
        "method": "mspo",
        "engine": engine,
        "meta_batch_size": max(1, round(m * workload.pairs)),
        "meta_every": 1,
        "lookahead_lr": LOOKAHEAD_LR,
        "noise_rate": 0.2,
        "warm_start": False,
    }
    return _ours(workload, tuning, home, **given | options)


def _ours(workload: Workload, tuning: Tuning, home: Path, **options: Any) -> Trainer:
    return MSPOTrainer(
        workload.model(tuning),
        MSPOConfig(
            **_common(workload, home),
            tuning=tuning,
            gradient_accumulation_steps=1,
            reference_cache=str(home / "reference"),
            **options,
        ),
        workload.train_pairs(),
        workload.clean_pairs() if options["method"] == "mspo" else None,
        processing_class=workload.tokenizer(),
    )


def _common(workload: Workload, home: Path) -> dict[str, Any]:
    return {
        "output_dir": str(home / "run"),
        "per_device_train_batch_size": workload.pairs,
        "bf16": workload.device == "cuda",
        "use_cpu": workload.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress logs, warnings and progress bars while a trainer is made."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
