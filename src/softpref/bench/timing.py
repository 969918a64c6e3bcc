"""Seconds per step of several contestants, measured so that their ratios are comparable.

In every round each contestant does one step on the same batch, in an order that rotates by one from
round to round. Ratios are formed within a round, so a temporary slowdown affects both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from softpref.bench.contestants import Contestant, Name


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a sample."""

    median: float
    q1: float
    q3: float


def quartiles(sample: list[float]) -> Quartiles | None:
    """Return the sample's quartiles by interpolation; None for an empty sample."""
    if not sample:
        return None
    values = torch.tensor(sample, dtype=torch.float64)
    q1, median, q3 = values.quantile(values.new_tensor([0.25, 0.5, 0.75])).tolist()
    return Quartiles(median, q1, q3)


def paired_ratio(ours: list[float], theirs: list[float]) -> Quartiles | None:
    """Return the quartiles of ours / theirs over the rounds of both."""
    return quartiles([a / b for a, b in zip(ours, theirs, strict=False)])


def time_rounds(
    contestants: Mapping[Name, Contestant],
    rounds: Mapping[Name, int],
    device: str,
    after_step: Callable[[], object],
) -> dict[Name, list[float]]:
    """Return the seconds of every timed step, by contestant and round.

    Args:
        contestants: contestants by name; each first does one untimed step.
        rounds: number of rounds by contestant.
        device: "cpu" or "cuda".
        after_step: called after every step, timed or not.

    Returns:
        One list per contestant, empty if its step does not fit in the device's memory.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in contestants}
    fitting = []
    for name, contestant in contestants.items():
        if _fits(contestant):
            fitting.append(name)
        after_step()
    for batch in range(max(rounds.values())):
        names = [name for name in fitting if batch < rounds[name]]
        first = batch % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_time(contestants[name], batch, device))
            after_step()
    return seconds


def _fits(contestant: Contestant) -> bool:
    try:
        contestant.clear()
        contestant.step(0)
    except torch.OutOfMemoryError:
        return False
    finally:
        contestant.clear()
    return True


def _time(contestant: Contestant, batch: int, device: str) -> float:
    _synchronise(device)
    start = time.perf_counter()
    contestant.step(batch)
    _synchronise(device)
    seconds = time.perf_counter() - start
    contestant.clear()
    return seconds


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
