"""Training pairs from several sources in given shares."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from softpref.data.sources import LoadedPairs, by_source, subset
from softpref.data.splits import removed_by_source, without_clean
from softpref.errors import UsageError

logger = logging.getLogger(__name__)

MIX = "Shares of the pairs by file, such as 0.7 0.3; default: all pairs of all files."
"""Help text of `--mix`, for every command that has it."""


def shares_of(names: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights of `--mix` as shares that sum to 1.

    Raises:
        UsageError: there is only one source, the number of weights is wrong, or a weight is not
            positive and finite.
    """
    given = "--mix " + " ".join(f"{weight:g}" for weight in weights)
    if len(names) == 1:
        raise UsageError(f"{given}: there is only {names[0]} to mix; remove --mix.")
    if len(weights) != len(names):
        raise UsageError(f"{given}: give one weight for each of the {len(names)} files.")
    total = sum(weights)
    shares = tuple(weight / total for weight in weights) if 0 < total < math.inf else ()
    if not shares or min(shares) <= 0:
        raise UsageError(f"{given}: every weight must be a positive finite number.")
    return shares


def counts_of(available: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Return the number of pairs per source in the largest mix without repeats."""
    largest = min(count / share for count, share in zip(available, shares, strict=True))
    return [round(largest * share) for share in shares]


def mixed(
    loaded: LoadedPairs, shares: tuple[float, ...], seed: int, clean: LoadedPairs | None = None
) -> LoadedPairs:
    """Draw the largest set with these shares and no repeats, in the order of the sources.

    Args:
        loaded: pairs of several sources.
        shares: of its sources, in their order, from `shares_of`.
        seed: of the draw.
        clean: pairs to remove before the draw, since removing them later would change the shares.

    Raises:
        UsageError: a share is too small for a single pair.
    """
    pairs, where = loaded.pairs, Counter[str]()
    if clean:
        pairs, _ = without_clean(pairs, clean.pairs)
        where = removed_by_source(loaded, pairs, clean)
    sizes = dict.fromkeys(loaded.fingerprints, 0)
    sizes |= {name: len(part) for name, part in by_source(pairs, loaded.source)}
    for name, size in sizes.items():
        if not size:
            raise UsageError(f"--mix: all pairs of {name} are trusted pairs too: remove the file.")
    counts = counts_of([*sizes.values()], shares)
    for name, count in zip(sizes, counts, strict=True):
        if not count:
            raise UsageError(f"--mix leaves no pair of {name}: give it a larger weight.")
    draw, start, kept = random.Random(seed), 0, []
    for size, count in zip(sizes.values(), counts, strict=True):
        kept += [start + at for at in sorted(draw.sample(range(size), count))]
        start += size
    parts = zip(sizes.items(), counts, strict=True)
    text = ", ".join(f"{count} of {size} pairs of {name}" for (name, size), count in parts)
    logger.info(f"mix: {text}; the rest is dropped")
    drawn = subset(loaded, pairs.select(np.array(kept)), loaded.source)
    return dataclasses.replace(
        drawn, shares=shares, also_clean=where.total(), where=drawn.where | {"also_clean": where}
    )
