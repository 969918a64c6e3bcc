"""Sets that must be disjoint: trusted pairs, training pairs, evaluation pairs; and their ties."""

import dataclasses
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
from datasets import Dataset

from softpref.columns import STANDARD
from softpref.data.bad_rows import place
from softpref.data.label_columns import LABEL, ties
from softpref.data.readers import dataset_rows, store
from softpref.data.sources import LoadedPairs, by_source, content_key, contents, subset
from softpref.errors import UsageError

logger = logging.getLogger(__name__)

TRUTH_RESTORED = "truth restored"
ASSUMED_CORRECT = "assumed correct, not reviewed"


def hold_out_clean(pairs: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset, str]:
    """Draw the clean pairs from the training data, before any other processing; none is a tie.

    Args:
        pairs: Pair rows, not yet tokenized.
        count: Number of pairs to hold out.
        seed: Seed of the draw.

    Returns:
        The rest, the held-out pairs (both in the order of `pairs`) and the origin of their
        labels: `TRUTH_RESTORED` if the rows have `is_flipped` (flipped pairs are swapped back),
        else `ASSUMED_CORRECT`.

    Raises:
        UsageError: If `count` is not positive or leaves no training pair.
    """
    labelled = [at for at, tied in enumerate(ties(pairs)) if not tied]
    if not 0 < count < len(labelled):
        without = ", without ties" if len(labelled) < len(pairs) else ""
        raise UsageError(
            f"--clean {count}: give a number from 1 to {len(labelled) - 1} or a file; "
            f"there are {len(labelled)} pairs to hold out from{without}."
        )
    drawn = sorted(random.Random(seed).sample(labelled, count))
    rest = pairs.select(np.delete(np.arange(len(pairs)), drawn))
    clean = pairs.select(drawn)
    if "is_flipped" not in pairs.column_names:
        return rest, clean, ASSUMED_CORRECT
    restored = [
        STANDARD.swapped(row) | {"is_flipped": False} if row["is_flipped"] else row
        for row in dataset_rows(clean)
    ]
    return rest, store(iter(restored), clean.features.arrow_schema), TRUTH_RESTORED


def without_ties(loaded: LoadedPairs, why: str) -> LoadedPairs:
    """Return the pairs of which one response is better, and log how many are not, and `why`.

    The fingerprint stays that of all pairs.

    Raises:
        UsageError: If every pair is a tie.
    """
    tied = np.array(ties(loaded.pairs))
    if not tied.any():
        return loaded
    if tied.all():
        raise UsageError(f"{loaded.source}: every pair is a tie. Add pairs with a better response.")
    logger.info(f"{loaded.source}: {tied.sum():,} of {len(tied):,} pairs are ties, {why}")
    kept = loaded.pairs.select(np.flatnonzero(~tied)).remove_columns(LABEL)
    found = subset(loaded, kept, loaded.source)
    return dataclasses.replace(
        found, fingerprint=loaded.fingerprint, fingerprints=loaded.fingerprints
    )


def places_of_ties(loaded: LoadedPairs) -> frozenset[tuple[str, int]]:
    """Return source and row of every tie."""
    return frozenset(
        (name, row)
        for name, part in by_source(loaded.pairs, loaded.source)
        for row, tied in zip(part["row"], ties(part), strict=True)
        if tied
    )


def without_clean(train: Dataset, clean: Dataset) -> tuple[Dataset, int]:
    """Remove the clean pairs from training, whichever way they are labelled there.

    Returns:
        The other training pairs, and the number of removed rows.

    Raises:
        UsageError: If no training pair is left.
    """
    trusted = set(_keys(clean))
    is_kept = np.fromiter((key not in trusted for key in _keys(train)), bool, len(train))
    if not is_kept.any():
        raise UsageError(
            "every pair is also in --clean, so none is left. Give other pairs or fewer clean ones."
        )
    if is_kept.all():
        return train, 0
    return train.select(is_kept.nonzero()[0]), int((~is_kept).sum())


def removed_by_source(loaded: LoadedPairs, kept: Dataset, clean: LoadedPairs) -> Counter[str]:
    """Return the number of pairs that `without_clean` removed, by "FILE and CLEAN_FILE"."""
    counts: Counter[str] = Counter()
    for name, pairs in by_source(loaded.pairs, loaded.source):
        counts[f"{name} and {clean.source}"] += len(pairs)
    for name, pairs in by_source(kept, loaded.source):
        counts[f"{name} and {clean.source}"] -= len(pairs)
    return +counts


def refuse_overlap(clean: Dataset, other: Dataset, name: str) -> None:
    """Refuse clean pairs that, in either order, are also in `other`; messages call it `name`.

    Raises:
        UsageError: If there are any; the message names the first such row of both.
    """
    row_of = dict(zip(_keys(clean), clean["row"], strict=True))
    shared = [
        (row_of[key], row)
        for key, row in zip(_keys(other), other["row"], strict=True)
        if key in row_of
    ]
    if shared:
        raise UsageError(
            f"--clean row {shared[0][0]} is also {place(name, shared[0][1])} "
            f"({len(shared)} such rows in all). Remove them from one of the two."
        )


def shared_counts(train: Dataset, others: Mapping[str, Dataset]) -> dict[str, int]:
    """Return by name how many pairs of other sets are training pairs too, in either order."""
    trained = set(_keys(train)) if others else set()
    return {name: sum(key in trained for key in _keys(of)) for name, of in others.items()}


def _keys(pairs: Dataset) -> Iterator[str]:
    for row in dataset_rows(contents(pairs)):
        yield content_key(**row)
