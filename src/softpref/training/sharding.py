"""A frozen base in shards, one on each process: as it is asked for, loaded and trained under."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from transformers import TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from softpref.algorithm.shards import groups, hold_still, is_sharded
from softpref.errors import UsageError
from softpref.training.config import MSPOConfig, refuse_with_shards

logger = logging.getLogger(__name__)


def shards_for(args: MSPOConfig) -> DistributedConfig | None:
    """Return how transformers is to shard a model while it loads it, None where it is to be whole.

    Over all processes: PEFT mistakes whole copies on each machine (HSDP) for tensor parallelism.
    """
    return DistributedConfig(fsdp_size=args.world_size) if args.shard_base else None


def settle(policy: nn.Module, args: MSPOConfig) -> None:
    """Move a whole policy to the process's device; hold a sharded base still where it lies.

    Raises:
        UsageError: the policy is not sharded as the options say, or in a way that cannot be used.
    """
    if not is_sharded(policy) and not args.shard_base:
        policy.to(args.device)
        return
    config = cast(Any, policy).config
    mesh = getattr(config, "distributed_config", None)
    sizes = mesh and (mesh.fsdp_size, mesh.tp_size, mesh.pp_size, mesh.ep_size)
    if sizes != (args.world_size, 1, 1, 1):
        raise UsageError(
            "--shard_base shards a model that is loaded by name: load yours with "
            f"distributed_config=DistributedConfig(fsdp_size={args.world_size}), and nothing else."
        )
    refuse_with_shards(args)
    if len(list(groups(policy))) == 1:
        raise UsageError(
            f"--shard_base: transformers has no plan for sharding {config.model_type} layer by "
            "layer, so each pass would gather it whole: leave --shard_base out."
        )
    logger.info("base: in shards, one on each of %d processes", args.world_size)
    hold_still(policy)


@contextmanager
def made_to_save_all(policy: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Let a Trainer be made of a sharded base, though it is to save its optimizer's state too.

    transformers refuses, for the state of shards is in shards. An adapter's is whole.
    """
    asked_for = args.save_only_model
    args.save_only_model |= is_sharded(policy)
    try:
        yield
    finally:
        args.save_only_model = asked_for
