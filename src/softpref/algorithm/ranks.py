"""The processes that do one step together, and the sums that make it one step.

Each rank measures its own share of the pairs. Whatever decides a label is summed or gathered, so
that it is the same number, to the bit, on every rank.

Shapes: a gradient is a tuple with one tensor for each trainable parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

Item = TypeVar("Item")


class DriftError(RuntimeError):
    """Ranks no longer hold the same numbers."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of torch.distributed's default group; by default it is alone.

    Attributes:
        rank: which of them it is, from 0.
        count: how many they are.
        device: where what they exchange must lie.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def here(device: torch.device) -> Ranks:
        """Return the ranks of this process's group; alone where no group was initialised."""
        if not distributed.is_initialized():
            return Ranks(device=device)
        return Ranks(distributed.get_rank(), distributed.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this rank's items, every `count`-th; all of them where there are fewer than ranks.

        In the latter case each rank does the whole: a mean over the items of all ranks stays what
        it was.
        """
        return items[self.rank :: self.count] if len(items) >= self.count else items

    def share_evenly(self, items: Sequence[Item]) -> list[Item]:
        """Return `share`, its first item once more at the end where other ranks have one more.

        Ranks that gather sharded weights in each forward pass must make equally many.
        """
        mine = self.share(items)
        return [*mine, *mine[: self.largest_share(len(items)) - len(mine)]]

    def largest_share(self, items: int) -> int:
        """Return how many of so many items the rank with most of them has."""
        return -(-items // self.count) if items >= self.count else items

    def smallest_share(self, items: int) -> int:
        """Return how many of so many items the rank with fewest of them has."""
        return items // self.count if items >= self.count else items

    def total(self, number: int) -> int:
        """Return the sum of a number over the ranks."""
        if self.count == 1:
            return number
        held = torch.tensor(number, device=self.device)
        distributed.all_reduce(held)
        return int(held)

    def wait(self) -> None:
        """Wait for all ranks."""
        self.total(0)

    def any(self, *, flag: bool) -> bool:
        """Return whether a flag is up on any rank."""
        return self.total(int(flag)) > 0

    def sum(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return each tensor's sum over the ranks, all of a dtype in one flat buffer.

        Shards are parts of what was summed already, and stay as they are.
        """
        if self.count == 1:
            return tuple(tensors)
        summed = list(tensors)
        own = [i for i, tensor in enumerate(tensors) if not isinstance(tensor, DTensor)]
        for dtype in dict.fromkeys(tensors[i].dtype for i in own):
            places = [i for i in own if tensors[i].dtype == dtype]
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
            distributed.all_reduce(flat)
            sizes = [tensors[i].numel() for i in places]
            for i, part in zip(places, flat.split(sizes), strict=True):
                summed[i] = part.view_as(tensors[i])
        return tuple(summed)

    def gather(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """Return columns, (R,) or (R, K), of all ranks, rank by rank; R may differ between them.

        They travel as float64, so integers must be below 2^53.
        """
        if self.count == 1:
            return list(columns)
        parts_of_rows = [column.double()[:, None].flatten(1) for column in columns]
        rows = torch.cat(parts_of_rows, 1)
        mine = torch.tensor(len(rows), device=rows.device)
        counts = [torch.empty_like(mine) for _ in range(self.count)]
        distributed.all_gather(counts, mine)
        padded = rows.new_zeros(max(map(int, counts)), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        distributed.all_gather(parts, padded)
        whole = torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])
        back = whole.split([part.shape[1] for part in parts_of_rows], 1)
        return [
            one.reshape(-1, *column.shape[1:]).to(column)
            for one, column in zip(back, columns, strict=True)
        ]

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's text, rank by rank."""
        if self.count == 1:
            return [text]
        mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        (sizes,) = self.gather([torch.tensor([len(mine)], device=self.device)])
        (whole,) = self.gather([mine])
        return [bytes(part.tolist()).decode() for part in whole.split(sizes.tolist())]

    def from_first(self, text: str = "") -> str:
        """Return rank 0's text on every rank."""
        return self.gather_text(text if self.is_first else "")[0]

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Put rank 0's numbers into every rank's tensors."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)

    def require_alike(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Compare tensors with rank 0's, bit for bit.

        Raises:
            DriftError: on every rank, if some rank's differ.
        """
        if self.count == 1:
            return
        differs = False
        for tensor in tensors:
            first = tensor.detach().clone()
            distributed.broadcast(first, 0)
            differs |= not torch.equal(first, tensor.detach())
        if self.any(flag=differs):
            raise DriftError(f"{what} differs between processes, which must hold the same")


ALONE = Ranks()
