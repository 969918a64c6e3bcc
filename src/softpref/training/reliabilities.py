"""How right each annotator is, learned while the policy trains: RE-PO's state beside its labels.

Shapes: n training pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from softpref.algorithm.labeller import Labeller
from softpref.algorithm.likelihood import Measured
from softpref.algorithm.posterior_labeller import PosteriorLabeller
from softpref.data.readers import column
from softpref.models.scoring import numbers
from softpref.training.labels import LabelHistory

ANNOTATOR_INDEX = "annotator_index"


class Reliabilities:
    """Lets each annotator's reliability follow the labels of a step.

    Args:
        labeller: whose reliabilities these are.
        pairs: the training pairs.
    """

    def __init__(self, labeller: PosteriorLabeller, pairs: Dataset) -> None:
        self._labeller = labeller
        self._annotator, own = (numbers_or_nan(pairs, n) for n in (ANNOTATOR_INDEX, "given_label"))
        self._is_own = ~own.isnan()
        self._weight = numbers_or_nan(pairs, "weight").nan_to_num(1.0)

    def before_step(self, history: LabelHistory) -> None:
        """Do nothing: reliabilities change after a step."""

    def with_first_labels(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a step's pairs as they are: each visit has a new label."""
        return [dict(row) for row in rows]

    def seen(self, scored: Measured) -> Measured:
        """Return measurements of all training pairs as they are."""
        return scored

    def keep(self, index: Tensor, soft_label: Tensor) -> None:
        """Follow the labels of a step, (B,), without those that pairs brought."""
        learned = ~self._is_own[index]
        own, labels = index[learned], soft_label[learned]
        self._labeller.follow(self._annotator[own], labels, self._weight[own])

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs."""
        return {"reliabilities": self._labeller.reliability}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        self._labeller.reliability.copy_(tensors["reliabilities"])


def annotator_names(pairs: Dataset) -> list[str]:
    """Return the names of the annotators, in alphabetical order."""
    if "annotator" not in pairs.column_names:
        return []
    return sorted(name for name in column(pairs, "annotator").unique().to_pylist() if name)


def reliabilities_of(labeller: Labeller, pairs: Dataset) -> dict[str, float] | None:
    """Return each annotator's learned share of right labels by name; None where none is learned.

    Pairs without an annotator have theirs under "".
    """
    if not isinstance(labeller, PosteriorLabeller):
        return None
    found = dict(zip([*annotator_names(pairs), ""], labeller.reliability.tolist(), strict=True))
    if numbers_or_nan(pairs, ANNOTATOR_INDEX).isfinite().all():
        del found[""]
    return found


def with_annotator_index(pairs: Dataset) -> Dataset:
    """Add each pair's place among `annotator_names`, NaN where its annotator is unknown, if any."""
    annotators = annotator_names(pairs)
    if not annotators:
        return pairs
    places = pc.index_in(column(pairs, "annotator"), pa.array(annotators))  # null where unknown
    return pairs.add_column(ANNOTATOR_INDEX, places.cast(pa.float64()).to_numpy())


def numbers_or_nan(pairs: Dataset, name: str) -> Tensor:
    """Return a column of numbers, (n,); NaN where the pairs do not have it."""
    if name not in pairs.column_names:
        return torch.full((len(pairs),), torch.nan)
    return numbers(pairs, name)
