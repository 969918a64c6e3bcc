"""The meta-learner with all that teaches it: its optimizer and the sampler of clean pairs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from softpref.algorithm.labeller import MetaLearner, warm_start
from softpref.algorithm.ranks import Ranks
from softpref.algorithm.signals import EVIDENCE, PPL_DIFF, SIGNALS
from softpref.training.config import MSPOConfig
from softpref.training.samplers import CleanSampler
from softpref.training.scoring import starting_ppl_diff, starting_signals
from softpref.training.states import JSON, state_to_tensors, tensors_to_state

ZSCORE_PAIRS = 1000
META_LEARNER = "meta_learner.safetensors"


def make_meta_learner(
    args: MSPOConfig, noisy: Tensor, clean: Tensor, clean_score: Tensor, noise_rate: float
) -> MetaLearner:
    """Make V with its z-score set and, if asked for, warm-started.

    Args:
        args: the run's options.
        noisy: (n, F), the training pairs' signals under the starting policy; the first 1,000 set
            the z-score (Appendix C).
        clean: (m, F), the same of the clean pairs.
        clean_score: (m,) what the warm start learns of them: minus PPLDiff, or evidence.
        noise_rate: the share of flipped labels, the warm start's prior.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        meta_learner = MetaLearner(args.meta_hidden, args.resolved_signals())
    meta_learner.standardise(noisy[:ZSCORE_PAIRS])
    if args.warm_start:
        warm_start(meta_learner, clean, clean_score, noise_rate)
    return meta_learner


def make_teacher(
    args: MSPOConfig, pairs: Dataset, clean: Dataset, noise_rate: float, ranks: Ranks, steps: int
) -> Teacher:
    """Make V from both sets' signals under the starting policy, the same on all ranks.

    Args:
        args: the run's options.
        pairs: the training pairs.
        clean: the trusted pairs.
        noise_rate: the share of flipped labels.
        ranks: who trains together.
        steps: of the policy.
    """
    signals = args.resolved_signals()
    noisy, trusted = (starting_signals(some, signals) for some in (pairs, clean))
    score = -starting_ppl_diff(clean)
    if EVIDENCE in signals:
        score = trusted[:, signals.index(EVIDENCE)]
    meta_learner = make_meta_learner(args, noisy, trusted, score, noise_rate)
    ranks.broadcast_(list(meta_learner.to(args.device).state_dict().values()))
    return Teacher(meta_learner, clean, args, math.ceil(steps / args.meta_every))


def save_meta_learner(meta_learner: MetaLearner, directory: Path) -> None:
    """Write V, z-score and the names of its signals included, to `meta_learner.safetensors`."""
    state = {name: tensor.cpu() for name, tensor in meta_learner.state_dict().items()}
    names = " ".join(signal.name for signal in meta_learner.signals)
    save_file(state, directory / META_LEARNER, {"signals": names})


def load_meta_learner(directory: Path) -> MetaLearner:
    """Read what `save_meta_learner` wrote; a file that names no signals is of PPLDiff alone."""
    with safe_open(directory / META_LEARNER, "pt") as file:
        names = (file.metadata() or {}).get("signals", PPL_DIFF.name)
    state = load_file(directory / META_LEARNER)
    signals = [SIGNALS[name] for name in names.split()]
    meta_learner = MetaLearner(len(state["layers.0.bias"]), signals)
    meta_learner.load_state_dict(state)
    return meta_learner


class Teacher:
    """V(·; φ), its AdamW (Table 5: no decay, never clipped) and the clean pairs it learns from.

    Attributes:
        meta_learner: V.
        optimizer: takes the step of Eq. 10.
    """

    def __init__(
        self, meta_learner: MetaLearner, clean: Dataset, args: MSPOConfig, meta_updates: int
    ) -> None:
        self.meta_learner = meta_learner
        self.optimizer = torch.optim.AdamW(
            meta_learner.parameters(), lr=args.resolved_meta_lr(meta_updates), weight_decay=0.0
        )
        self._clean = clean
        self._sampler = CleanSampler(len(clean), args.meta_batch_size, args.seed)

    def draw(self) -> list[dict[str, Any]]:
        """Return the next batch of clean pairs."""
        return self._clean.select(self._sampler.draw()).to_list()

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        """Return everything that `restore` needs to teach on, bit for bit."""
        optimizer, values = state_to_tensors(self.optimizer.state_dict())
        tensors = {f"meta_optimizer.{k}": v for k, v in optimizer.items()}
        tensors |= {f"meta_learner.{k}": v for k, v in self.meta_learner.state_dict().items()}
        tensors |= {f"clean_sampler.{k}": v for k, v in self._sampler.state().items()}
        return tensors, {"meta_optimizer": values}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on where `state` was taken."""

        def part(name: str) -> dict[str, Tensor]:
            return {
                k.removeprefix(f"{name}."): v
                for k, v in tensors.items()
                if k.startswith(f"{name}.")
            }

        self.meta_learner.load_state_dict(part("meta_learner"))
        self.optimizer.load_state_dict(
            tensors_to_state(part("meta_optimizer"), values["meta_optimizer"])
        )
        self._sampler.restore(part("clean_sampler"))
