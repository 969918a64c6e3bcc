"""A policy whose frozen base lies in shards, one on each process, gathered layer by layer (FSDP2).

An adapter on it is whole on each process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(policy: nn.Module) -> bool:
    """Return whether some of the policy's weights lie in shards."""
    return any(isinstance(parameter, DTensor) for parameter in policy.parameters())


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter, gathered from its shards if it has any; all processes must ask."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def groups(policy: nn.Module) -> Iterator[FSDPModule]:
    """Yield the modules whose own weights are gathered together, the outermost first."""
    return (module for module in policy.modules() if isinstance(module, FSDPModule))


def freeze_shards(policy: nn.Module) -> None:
    """Freeze what lies in shards, before the first forward pass, and keep the head once gathered.

    What is gathered trains or not as its shard did when it was gathered first. A head that only
    its hidden states are read from has no backward pass, in which its group would be gathered
    again.
    """
    for parameter in policy.parameters():
        if isinstance(parameter, DTensor):
            parameter.requires_grad_(False)
    model = cast(Any, policy)
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        if isinstance(module, FSDPModule):  # a tied head is in the embedding's group
            module.set_reshard_after_backward(False, recurse=False)
            break


def reshard_after_error(policy: nn.Module) -> None:
    """Put gathered weights away after a pass that ended in an exception."""
    for outermost in groups(policy):
        outermost.reset_iter_state()
        break
