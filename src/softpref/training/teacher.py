"""The meta-learner with all that teaches it: its optimizer and the sampler of clean pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from softpref.algorithm.labeller import MetaLearner, warm_start
from softpref.algorithm.ranks import Ranks
from softpref.algorithm.signals import EVIDENCE, PPL_DIFF, SIGNALS, Signal
from softpref.models.scoring import starting_ppl_diff, starting_signals
from softpref.training.samplers import CleanSampler
from softpref.training.states import JSON, state_to_tensors, tensors_to_state

ZSCORE_PAIRS = 1000
META_LEARNER = "meta_learner.safetensors"


@dataclass(frozen=True)
class TeachingOptions:
    """How a meta-learner is made and taught, all filled in.

    Attributes:
        hidden: width of its two hidden layers.
        signals: what it sees of a pair.
        warm_start: whether it is fitted to the clean pairs before training.
        learning_rate: of its AdamW.
        batch_size: clean pairs per update.
        seed: of its weights and of the clean pairs' order.
    """

    hidden: int
    signals: tuple[Signal, ...]
    warm_start: bool
    learning_rate: float
    batch_size: int
    seed: int


def make_meta_learner(
    options: TeachingOptions, noisy: Tensor, clean: Tensor, clean_score: Tensor, noise_rate: float
) -> MetaLearner:
    """Make V with its z-score set and, if asked for, warm-started.

    Args:
        options: how.
        noisy: (n, F), the training pairs' signals under the starting policy; the first 1,000 set
            the z-score (Appendix C).
        clean: (m, F), the same of the clean pairs.
        clean_score: (m,) what the warm start learns of them: minus PPLDiff, or evidence.
        noise_rate: the share of flipped labels, the warm start's prior.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        meta_learner = MetaLearner(options.hidden, options.signals)
    meta_learner.standardise(noisy[:ZSCORE_PAIRS])
    if options.warm_start:
        warm_start(meta_learner, clean, clean_score, noise_rate)
    return meta_learner


def make_teacher(
    options: TeachingOptions, pairs: Dataset, clean: Dataset, noise_rate: float, ranks: Ranks
) -> Teacher:
    """Make V from both sets' signals under the starting policy, the same on all ranks.

    Args:
        options: how.
        pairs: the training pairs.
        clean: the trusted pairs.
        noise_rate: the share of flipped labels.
        ranks: who trains together.
    """
    signals = options.signals
    noisy, trusted = (starting_signals(some, signals) for some in (pairs, clean))
    score = -starting_ppl_diff(clean)
    if EVIDENCE in signals:
        score = trusted[:, signals.index(EVIDENCE)]
    meta_learner = make_meta_learner(options, noisy, trusted, score, noise_rate)
    ranks.broadcast_(list(meta_learner.to(ranks.device).state_dict().values()))
    return Teacher(meta_learner, clean, options)


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

    def __init__(self, meta_learner: MetaLearner, clean: Dataset, options: TeachingOptions) -> None:
        self.meta_learner = meta_learner
        self.optimizer = torch.optim.AdamW(  # fused: one operation on all of φ
            meta_learner.parameters(), lr=options.learning_rate, weight_decay=0.0, fused=True
        )
        self._clean = clean
        self._sampler = CleanSampler(len(clean), options.batch_size, options.seed)

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
