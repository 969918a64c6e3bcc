"""Which engine makes the margins' Jacobian in a run's steps."""

from __future__ import annotations

from datasets import Dataset
from torch import nn

from softpref.algorithm.gradients.engine import (
    KEEP_BUDGET_GIB,
    Engine,
    EngineChoice,
    StepSize,
    choose_engine,
)
from softpref.algorithm.gradients.shards import is_sharded
from softpref.data.batches import Collate
from softpref.errors import UsageError
from softpref.models.layout import mean_tokens, shortest_pairs


def engine_for(
    policy: nn.Module,
    pairs: Dataset,
    collate: Collate,
    pairs_per_step: int,
    micro_batches: int,
    engine: Engine = "auto",
    keep_budget_gib: float = KEEP_BUDGET_GIB,
) -> EngineChoice:
    """Return the engine for steps of this size, tried on the shortest training pairs.

    Raises:
        UsageError: the base is in shards, and what trains does not go with that.
    """
    device = next(policy.parameters()).device
    probe = collate(shortest_pairs(pairs)).to(device)
    tokens = round(pairs_per_step * mean_tokens(pairs, shared=probe.position_ids is not None))
    step = StepSize(pairs_per_step, tokens, micro_batches)
    chosen = choose_engine(engine, policy, probe, step, keep_budget_gib)
    if chosen.by_pair and is_sharded(policy):
        raise UsageError(
            f"--shard: the gradients of {len(chosen.by_pair)} trained tensors "
            f"({chosen.by_pair[0]}, ...) go pair by pair, and processes may not have as many "
            "pairs: adapt linear layers only (--tuning lora, --lora_target_modules), or leave "
            "--shard out."
        )
    return chosen
