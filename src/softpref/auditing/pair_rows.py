"""What an audit says of each pair: the rows of its `labels.jsonl`."""

from __future__ import annotations

import logging

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from softpref.auditing.beliefs import Beliefs, flag
from softpref.auditing.explanations import Explained, labelled_otherwise, reason
from softpref.auditing.scores import Scored
from softpref.data.readers import column, dataset_rows, store

logger = logging.getLogger(__name__)

LABELS = "labels.jsonl"
RUN_COLUMNS = ("soft_label", "margin", "step")


def pair_rows(
    scored: Scored, beliefs: Beliefs, explained: Explained, labels: pa.Table | None
) -> Dataset:
    """Return what an audit says of each pair, in the order of the data.

    Args:
        scored: the pairs.
        beliefs: how far their labels are believed.
        explained: why.
        labels: those of a run, None without one.
    """
    named = [name for name in ("uid", "row", "source") if name in scored.pairs.column_names]
    places = scored.pairs.select_columns(named)
    numbers = Dataset(
        pa.table(
            {
                "ppl_diff": scored.ppl_diff.numpy(),
                **_labels_by_uid(labels, column(places, "uid")),
                "p_correct": beliefs.p_correct.numpy(),
                "rank": beliefs.rank.numpy(),
                "evidence": pa.StructArray.from_arrays(
                    [pa.array(nats.numpy()) for nats in explained.evidence.values()],
                    list(explained.evidence),
                ),
            }
        )
    )
    trusted_rows = column(scored.clean, "row").to_numpy()
    sentences = (
        {
            "flag": flag(row["p_correct"]),
            "why": reason(
                row["evidence"], beliefs.speaks, trusted_rows[closest.numpy()].tolist(), where
            ),
        }
        for row, closest, where in zip(
            dataset_rows(numbers), explained.closest, labelled_otherwise(scored.pairs), strict=True
        )
    )
    words = store(sentences, pa.schema([("flag", pa.string()), ("why", pa.string())]))
    return concatenate_datasets([places, numbers, words], axis=1)


def _labels_by_uid(labels: pa.Table | None, uids: pa.ChunkedArray) -> dict[str, pa.Array]:
    if labels is None:
        return {name: pa.nulls(len(uids)) for name in RUN_COLUMNS}
    places = pc.index_in(uids, value_set=labels["uid"])
    if places.null_count:
        logger.warning(
            "%d of %d pairs are not among those that the run trained on, and have no soft_label, "
            "margin and step", places.null_count, len(uids),
        )  # fmt: skip
    return {name: labels[name].take(places) for name in RUN_COLUMNS}
