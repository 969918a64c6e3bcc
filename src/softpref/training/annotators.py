"""Who labelled which pair, and how often each annotator is right.

Shapes: n noisy pairs, m trusted pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from softpref.data.parsing import ANNOTATOR
from softpref.data.readers import column, dataset_rows
from softpref.data.sources import content_key, contents, in_sorted_order
from softpref.statistics.annotators import Reliability, estimate_reliability


def annotators_of(
    loaded: Dataset, noisy: Dataset, trusted: Dataset, evidence: Tensor, of_trusted: Tensor
) -> dict[str, Reliability]:
    """Return the reliability of each annotator, by name; none where the data name no annotator.

    A pair that several have labelled, in either order, is one content, and so is a trusted pair
    that an annotator has labelled.

    Args:
        loaded: the labels, with those of trusted pairs.
        noisy: those of them that have evidence.
        trusted: trusted pairs; their own annotators are not read.
        evidence: (n,) of noisy pairs, odd, such as g in nats; zeros where it does not speak.
        of_trusted: (m,) the same of trusted pairs.
    """
    if ANNOTATOR not in loaded.column_names:
        return {}
    keys, sides = zip(*(placed(pairs) for pairs in (loaded, noisy, trusted)), strict=True)
    _, place = torch.cat(keys).unique(return_inverse=True)
    content, with_evidence, known = place.split([len(pairs) for pairs in (loaded, noisy, trusted)])
    count = int(place.max()) + 1
    spoken = torch.cat([evidence * sides[1], of_trusted * sides[2]]).double()
    at = torch.cat([with_evidence, known])
    mean = torch.bincount(at, spoken, count) / torch.bincount(at, minlength=count).clamp_min(1)
    truth = torch.zeros(count, dtype=torch.float64).index_add_(0, known, sides[2]).sign()
    encoded = column(loaded, ANNOTATOR).combine_chunks().dictionary_encode()
    annotator = torch.tensor(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)).long()
    found = estimate_reliability(content, annotator, sides[0], mean, truth)
    return dict(zip(encoded.dictionary.to_pylist(), found, strict=True))


def placed(pairs: Dataset) -> tuple[Tensor, Tensor]:
    """Return a number for each pair's content, and 1 or −1 for the order of its responses, (N,)."""

    def numbers() -> Iterator[tuple[int, int]]:
        for row in dataset_rows(contents(pairs)):
            ahead = in_sorted_order(row["chosen"], row["rejected"])
            yield int(content_key(**row)[:16], 16) - 2**63, 2 * ahead - 1

    kind = np.dtype([("key", np.int64), ("side", np.int64)])
    found = np.fromiter(numbers(), kind, len(pairs))
    return torch.tensor(found["key"].copy()), torch.tensor(found["side"].copy()).double()
