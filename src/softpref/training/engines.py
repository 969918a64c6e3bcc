"""Which engine makes the margins' Jacobian in a run's steps."""

from __future__ import annotations

import math

from datasets import Dataset
from torch import nn

from softpref.algorithm.engine import EngineChoice, StepSize, choose_engine
from softpref.algorithm.shards import is_sharded
from softpref.data.batches import Collate
from softpref.errors import UsageError
from softpref.training.config import MSPOConfig
from softpref.training.layout import mean_tokens, shortest_pairs
from softpref.training.recompute import checkpoint_activations


def engine_for(
    policy: nn.Module, pairs: Dataset, collate: Collate, args: MSPOConfig
) -> EngineChoice:
    """Return the engine for steps of this size, tried on the shortest training pairs.

    Raises:
        UsageError: the base is in shards, and what trains does not go with that.
    """
    if args.activation_checkpointing:  # as `train` will, for it decides on the graphs' size
        checkpoint_activations(policy)
        policy.train()
    micro_batches = args.gradient_accumulation_steps
    count = args.per_device_train_batch_size * micro_batches
    if args.clean_gradient == "current":
        count += math.ceil(args.meta_batch_size / args.world_size)
    probe = collate(shortest_pairs(pairs)).to(args.device)
    tokens = round(count * mean_tokens(pairs, shared=probe.position_ids is not None))
    step = StepSize(count, tokens, micro_batches)
    chosen = choose_engine(args.engine, policy, probe, step, args.keep_budget_gib)
    if chosen.by_pair and is_sharded(policy):
        raise UsageError(
            f"--shard_base: the gradients of {len(chosen.by_pair)} tensors of the adapter "
            f"({chosen.by_pair[0]}, ...) go pair by pair, and processes may not have as many "
            "pairs: adapt linear layers only (--lora_target_modules), or leave --shard_base out."
        )
    return chosen
