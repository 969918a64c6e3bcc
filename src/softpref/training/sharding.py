"""A frozen base in shards, one on each process, under an adapter that is whole on each."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from softpref.errors import UsageError
from softpref.training.config import MSPOConfig, refuse_with_shards

logger = logging.getLogger(__name__)


def sharding(args: MSPOConfig) -> DistributedConfig | None:
    """Return how transformers is to shard a model while it loads it, None where it is to be whole.

    Over all processes: PEFT mistakes whole copies on each machine (HSDP) for tensor parallelism.
    """
    return DistributedConfig(fsdp_size=args.world_size) if args.shard_base else None


def place(policy: nn.Module, args: MSPOConfig) -> None:
    """Put a whole policy on the process's device; hold a sharded base still where it lies.

    A shard is gathered into a tensor that trains or not as the shard did when it was gathered
    first, so a base is frozen before its first forward pass.

    Raises:
        UsageError: the policy is not sharded as the options say, or they do not go with shards.
    """
    shards = [p for p in policy.parameters() if isinstance(p, DTensor)]
    if not shards and not args.shard_base:
        policy.to(args.device)
        return
    if not shards:
        raise UsageError(
            "--shard_base shards a model that is loaded by name: load yours with "
            "distributed_config=DistributedConfig(fsdp_size=...)."
        )
    refuse_with_shards(args)
    logger.info("base: in shards, one on each of %d processes", args.world_size)
    for shard in shards:
        shard.requires_grad_(False)


def whole_parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is not in shards, an adapter's tensors among it, by name."""
    return {name: p for name, p in policy.named_parameters() if not isinstance(p, DTensor)}


@contextmanager
def with_whole_optimizer(args: MSPOConfig) -> Iterator[None]:
    """Let a Trainer be made of a sharded base, though it is to save its optimizer's state too.

    transformers refuses, for the state of shards is in shards. An adapter's is whole.
    """
    asked_for, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = asked_for
