"""A policy whose weights lie in shards, one on each process, gathered layer by layer (FSDP2).

A frozen base carries an adapter that is whole on each process. Weights that train themselves have
gradients in shards too, summed over the processes within the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm


def is_sharded(policy: nn.Module) -> bool:
    """Return whether some of the policy's weights lie in shards."""
    return any(isinstance(parameter, DTensor) for parameter in policy.parameters())


def trains_shards(policy: nn.Module) -> bool:
    """Return whether weights that lie in shards are trained."""
    return any(isinstance(p, DTensor) and p.requires_grad for p in policy.parameters())


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter, gathered from its shards if it has any; all processes must ask."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def local(tensor: Tensor) -> Tensor:
    """Return this process' shard, in the storage of the tensor; a whole tensor as it is."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor that each process has whole in shards where the parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)  # sends nothing


def without_shards(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors that are whole."""
    return {name: each for name, each in tensors.items() if not isinstance(each, DTensor)}


def norm_over_all(tensors: Iterable[Tensor]) -> Tensor:
    """Return the norm of all entries, shape (); of shards with those of the other processes."""
    tensors = list(tensors)
    shards = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    if not shards:
        return get_total_norm(tensors)
    squared = get_total_norm([local(shard) for shard in shards]).square()
    distributed.all_reduce(squared, group=shards[0].device_mesh.get_group())
    own = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    return (squared + get_total_norm(own).square() if own else squared).sqrt()


def pulled_back(
    outputs: Tensor, parameters: Sequence[Tensor], weights: Tensor, *, keep_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradient of Σ_i w_i outputs_i; of shards its sum over the processes, in shards.

    Shards get their gradient from `backward` alone: `autograd.grad` does not know them.
    """
    if not any(isinstance(p, DTensor) for p in parameters):
        return torch.autograd.grad(
            outputs, parameters, weights, retain_graph=keep_graph, materialize_grads=True
        )
    for p in parameters:
        p.grad = None
    outputs.backward(weights, retain_graph=keep_graph)
    found = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
    for p in parameters:
        p.grad = None
    return found


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


def reduce_gradients(policy: nn.Module, divisor: int = 1) -> None:
    """Let backward passes leave the sum of the processes' gradients of shards, divided so."""
    for group in groups(policy):
        group.set_gradient_divide_factor(float(divisor))
        group.set_force_sum_reduction_for_comms(True)  # gloo has no other


def put_away_after_pass(policy: nn.Module, read: Tensor) -> None:
    """Put away what a forward pass left gathered of trained weights, until one goes back from it.

    The head and the last norm are left so, and would stand between passes for weights that have
    moved since. Taps on them and `head.py` read them sooner than FSDP2 would gather them.

    Args:
        policy: has made the pass.
        read: what it came to, from where a backward pass will begin.
    """
    if not trains_shards(policy):
        return
    left = _gathered(policy)
    for group in left:
        group.reshard()

    def gather_again(_: Tensor) -> None:
        for group in left:
            group.unshard()

    if read.requires_grad:
        read.register_hook(gather_again)


def _gathered(policy: nn.Module) -> list[FSDPModule]:
    """Return the modules whose groups are whole now: of each weight the nearest that is one."""
    modules = dict(policy.named_modules())
    found = []
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        place = name.rpartition(".")[0]
        while not isinstance(modules[place], FSDPModule):
            place = place.rpartition(".")[0]
        if not isinstance(parameter, DTensor) and modules[place] not in found:
            found.append(cast(FSDPModule, modules[place]))
    return found


def reshard_after_error(policy: nn.Module) -> None:
    """Put gathered weights away after a pass that ended in an exception."""
    for outermost in groups(policy):
        outermost.reset_iter_state()
        break
