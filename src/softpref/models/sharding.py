"""A frozen base in shards, one on each process, and no other way to split a model."""

from __future__ import annotations

import logging
import os
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from softpref.algorithm.gradients.shards import freeze_shards, groups
from softpref.errors import UsageError

logger = logging.getLogger(__name__)


def can_shard() -> bool:
    """Return whether transformers shards a model as it loads it, and torch recovers from errors."""
    return hasattr(DistributedConfig, "fsdp_size") and hasattr(FSDPModule, "reset_iter_state")


def sharded_over(processes: int) -> DistributedConfig:
    """Return how transformers is to shard a model while it loads it.

    Over all processes: PEFT mistakes whole copies on each machine (HSDP) for tensor parallelism.
    """
    return DistributedConfig(fsdp_size=processes)


def hold_shards(policy: nn.Module, processes: int) -> None:
    """Freeze a base that lies in shards, layer by layer, one on each process.

    Raises:
        UsageError: the policy is not sharded, or in a way that cannot be used.
    """
    config = cast(Any, policy).config
    mesh = getattr(config, "distributed_config", None)
    sizes = mesh and (mesh.fsdp_size, mesh.tp_size, mesh.pp_size, mesh.ep_size)
    if sizes != (processes, 1, 1, 1):
        raise UsageError(
            "--shard_base shards a model that is loaded by name: load yours with "
            f"distributed_config=DistributedConfig(fsdp_size={processes}), and nothing else."
        )
    if len(list(groups(policy))) == 1:
        raise UsageError(
            f"--shard_base: transformers has no plan for sharding {config.model_type} layer by "
            "layer, so each pass would gather it whole: leave --shard_base out."
        )
    logger.info("base: in shards, one on each of %d processes", processes)
    freeze_shards(policy)


def refuse_engines(args: TrainingArguments) -> None:
    """Refuse engines that split a model over processes; on a CPU accelerate would ignore them.

    Raises:
        UsageError: DeepSpeed or FSDP is asked for, by options or by accelerate's launcher.
    """
    for name, given in (("DeepSpeed", args.deepspeed), ("FSDP", args.fsdp)):
        launched = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"
        if given or launched:
            raise UsageError(
                f"{name} is not supported: train runs on several GPUs without it, with torchrun or "
                "accelerate launch (softpref env --accelerate gpus). For a model too large for one "
                "train has --shard_base true; --bf16 true and --activation_checkpointing true save "
                "memory."
            )
