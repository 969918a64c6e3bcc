"""Which pairs a step draws: training pairs epoch by epoch, clean pairs without end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

_CHUNK = 1000


class EpochSampler(Sampler[int]):
    """Every training pair once an epoch, in an order that seed and epoch alone decide.

    The order of accelerate's `SeedableRandomSampler`, which makes a Python list of all places:
    40 bytes a pair, where this needs 4.
    """

    def __init__(self, pairs: int, seed: int) -> None:
        self._pairs, self._seed, self._epoch = pairs, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Have the coming pass be that of this epoch; accelerate's loader says which it is."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._pairs

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(self._pairs, generator=generator, dtype=torch.int32)
        for places in order.split(_CHUNK):
            yield from places.tolist()


class CleanSampler:
    """Endless batches of clean pairs: shuffled passes, one after the other.

    It has a generator of its own, since the global one is restored in the middle of an epoch when a
    run is resumed.
    """

    def __init__(self, pairs: int, batch_size: int, seed: int) -> None:
        self._pairs, self._batch_size = pairs, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._queue: list[int] = []

    def draw(self) -> list[int]:
        """Return the positions of the next batch."""
        while len(self._queue) < self._batch_size:
            self._queue += torch.randperm(self._pairs, generator=self._generator).tolist()
        drawn = self._queue[: self._batch_size]
        del self._queue[: self._batch_size]
        return drawn

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to continue with the same draws."""
        queue = torch.tensor(self._queue, dtype=torch.int64)
        return {"generator": self._generator.get_state(), "queue": queue}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self._generator.set_state(state["generator"])
        self._queue = state["queue"].tolist()


def train_loader(pairs: Dataset, args: TrainingArguments, processes: int) -> DataLoader:
    """Return micro-batches of all processes together, in an order drawn anew in every epoch."""
    loader = DataLoader(
        cast(Any, pairs),
        batch_size=args.per_device_train_batch_size * processes,
        sampler=EpochSampler(len(pairs), cast(int, args.data_seed)),
        collate_fn=list,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        drop_last=args.dataloader_drop_last,
    )
    return prepare_data_loader(loader, num_processes=1, process_index=0)
