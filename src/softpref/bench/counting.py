"""What one training step asks of the device: tensor operations, and waits for their results.

On a GPU a small step takes as long as it takes to launch them; a CPU counts the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_VIEWS = {_ATEN._unsafe_view.default}  # a view by another name
_BY_INDEX = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}
_TO_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist}


@dataclass(frozen=True)
class StepCounts:
    """What one step came to.

    Attributes:
        operations: operations that make or change tensors; views do neither.
        waits: how often the host waits for a number or a shape from the device.
    """

    operations: int
    waits: int


def count_step(step: Callable[[], object]) -> StepCounts:
    """Run `step` and return what it asked of the device.

    Waits are counted on a CPU too, where nothing moves: whatever reads a tensor's numbers, and
    whatever makes a tensor whose shape depends on them.
    """
    operations, transfers = _Operations(), _Transfers()
    with operations, transfers:
        step()
    return StepCounts(operations.count, operations.waits + transfers.count)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        makes = any(isinstance(each, Tensor) for each in _flat(result)) or func._schema.is_mutable
        self.count += makes and not func.is_view and func not in _VIEWS
        self.waits += _waits(func, args)
        return result


class _Transfers(TorchFunctionMode):
    """Counts calls that copy a tensor to the host: on a CPU no operation shows them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func in _TO_HOST
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: tuple) -> bool:
    if func in _BY_INDEX:  # only a mask's places have to be counted first
        return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
    tags = func.tags
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]
