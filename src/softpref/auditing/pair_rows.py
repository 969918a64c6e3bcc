"""The audit's result for each pair: the rows of `labels.jsonl`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from softpref.auditing.beliefs import PairBeliefs, flag
from softpref.auditing.explanations import Explanations, explanation_text, opposite_labels
from softpref.auditing.scores import ScoredSets
from softpref.data.readers import column, dataset_rows, store
from softpref.data.sources import content_key, in_sorted_order

logger = logging.getLogger(__name__)

LABELS = "labels.jsonl"
RUN_COLUMNS = ("soft_label", "margin", "step")


def pair_rows(
    scored: ScoredSets, beliefs: PairBeliefs, explanations: Explanations, labels: pa.Table | None
) -> Dataset:
    """Return the audit's result for each pair, in the order of the data.

    Args:
        scored: the pairs.
        beliefs: how reliable their labels are.
        explanations: the evidence behind that.
        labels: the labels of a run, of pairs labelled as it had them; None without one.
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
                    [pa.array(nats.numpy()) for nats in explanations.evidence.values()],
                    list(explanations.evidence),
                ),
            }
        )
    )
    trusted_rows = column(scored.clean, "row").to_numpy()
    sentences = (
        {
            "flag": flag(row["p_correct"]),
            "why": explanation_text(
                row["evidence"], beliefs.speaks, trusted_rows[closest.numpy()].tolist(), where
            ),
        }
        for row, closest, where in zip(
            dataset_rows(numbers), explanations.closest, opposite_labels(scored.pairs), strict=True
        )
    )
    texts = store(sentences, pa.schema([("flag", pa.string()), ("why", pa.string())]))
    return concatenate_datasets([places, numbers, texts], axis=1)


def _labels_by_uid(labels: pa.Table | None, uids: pa.ChunkedArray) -> dict[str, pa.Array]:
    if labels is None:
        return {name: pa.nulls(len(uids)) for name in RUN_COLUMNS}
    places = pc.index_in(uids, value_set=labels["uid"])
    if places.null_count:
        logger.warning(
            f"the run did not train on {places.null_count} of {len(uids)} pairs, or not as they "
            "are labelled now: these have no soft_label, margin or step"
        )
    return {name: labels[name].take(places) for name in RUN_COLUMNS}


def label_key(texts: Mapping[str, Any]) -> str:
    """Return a hash of a pair's texts and, by its last sign, which response is chosen."""
    prompt, chosen, rejected = (texts[name] for name in ("prompt", "chosen", "rejected"))
    sign = "+" if in_sorted_order(chosen, rejected) else "-"
    return content_key(prompt, chosen, rejected)[:16] + sign


def worse_first(fingerprint: str, uid: str) -> bool:
    """Draw whether a reviewer sees the response labelled worse first, alike in every tool.

    Args:
        fingerprint: of the audited data.
        uid: of the pair.
    """
    return Random(f"{fingerprint} {uid}").random() < 0.5
