"""A model in shards, one on each process, and no other way to split it."""

from __future__ import annotations

import logging
import os
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from softpref.algorithm.gradients.shards import freeze_shards, groups, reduce_gradients
from softpref.errors import UsageError

logger = logging.getLogger(__name__)


def can_shard() -> bool:
    """Return whether transformers shards a model as it loads it, and torch recovers from errors.

    The first version whose config says all that is asked here is also the first whose Trainer lets
    all processes into the save, where trained shards are gathered.
    """
    return hasattr(DistributedConfig, "ep_size") and hasattr(FSDPModule, "reset_iter_state")


def refuse_impossible_shards(args: TrainingArguments) -> None:
    """Refuse shards where there is one process, or one that would not hold what is loaded.

    Raises:
        UsageError: it is so, or a library is too old.
    """
    if not can_shard():
        raise UsageError(
            "--shard needs transformers 5.19 and torch 2.13 or newer; installed are "
            f"transformers {transformers.__version__} and torch {torch.__version__}."
        )
    if args.world_size == 1:
        raise UsageError(
            "--shard needs several processes: start them by torchrun or accelerate launch "
            "(softpref env --accelerate gpus)."
        )
    if args.use_cpu and torch.accelerator.is_available():
        raise UsageError("--use_cpu true: --shard loads shards onto accelerators; leave it out.")


def sharded_over(processes: int) -> DistributedConfig:
    """Return how transformers is to shard a model while it loads it.

    Over all processes: PEFT mistakes whole copies on each machine (HSDP) for tensor parallelism.
    """
    return DistributedConfig(fsdp_size=processes)


def freeze_base_shards(policy: nn.Module, processes: int) -> None:
    """Make ready a base in shards, one on each process, that stays as it is under an adapter.

    Raises:
        UsageError: the policy is not sharded, or in a way that cannot be used.
    """
    _require_layers(policy, processes)
    logger.info("base: in shards, one on each of %d processes", processes)
    freeze_shards(policy)


def train_all_shards(policy: nn.Module, processes: int, divisor: int = 1) -> None:
    """Make ready a policy whose weights all train, in shards, one on each process.

    Args:
        policy: loaded in shards.
        processes: how many share it.
        divisor: of the sums of gradients over the processes.

    Raises:
        UsageError: the policy is not sharded, or in a way that cannot be used.
    """
    _require_layers(policy, processes)
    logger.info("all weights: in shards, one on each of %d processes", processes)
    require_even_head(policy, processes)
    reduce_gradients(policy, divisor)


def _require_layers(policy: nn.Module, processes: int) -> None:
    """Refuse a policy that is not sharded layer by layer over all processes."""
    config = cast(Any, policy).config
    mesh = getattr(config, "distributed_config", None)
    sizes = mesh and (mesh.fsdp_size, mesh.tp_size, mesh.pp_size, mesh.ep_size)
    if sizes != (processes, 1, 1, 1):
        raise UsageError(
            "--shard shards a model that is loaded by name: load yours with "
            f"distributed_config=DistributedConfig(fsdp_size={processes}), and nothing else."
        )
    if len(list(groups(policy))) == 1:
        raise UsageError(
            f"--shard: transformers has no plan for sharding {config.model_type} layer by "
            "layer, so each pass would gather it whole: leave --shard out."
        )


def require_even_head(policy: Any, processes: int) -> None:
    """Refuse a tied head of uneven shards: torch pads it twice, and the head would never move."""
    head, words = policy.get_output_embeddings().weight, policy.get_input_embeddings().weight
    if head is words and len(head) % processes:
        raise UsageError(
            f"--shard: the head is the embedding too, and its {len(head)} rows do not make "
            f"{processes} equal shards: start a number of processes that divides {len(head)}."
        )


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
                "train has --shard true; --bf16 true and --activation_checkpointing true save "
                "memory."
            )
