"""Reference log-probs: computed once by the starting policy, kept on disk, read ever after.

Shapes: n pairs of a data set.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from itertools import chain
from typing import cast

import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig

from softpref.algorithm.ranks import Ranks
from softpref.algorithm.rows import PairBatch
from softpref.algorithm.shards import whole
from softpref.data.batches import PARTS, Collate
from softpref.data.readers import store_batches
from softpref.errors import UsageError
from softpref.training.column_cache import ColumnCache
from softpref.training.config import MSPOConfig
from softpref.training.drift import require_same_start
from softpref.training.preparation import Prepared
from softpref.training.reading import half_depth, read_pairs
from softpref.training.scoring import pass_over

logger = logging.getLogger(__name__)

COLUMNS = ("ref_chosen_logp", "ref_rejected_logp", "starting_ppl_diff")
SIGNALS = ("likeness", "distance", "chosen_spread", "rejected_spread", "overlap", "state")
FORMAT = 2
"""Of a part on disk; another one is made again."""
PART = 2000
"""Pairs that are kept together: an interrupted pass repeats at most this many."""


def sets_with_reference(
    policy: nn.Module,
    prepared: Prepared,
    args: MSPOConfig,
    policy_fingerprint: str,
    collate: Collate,
    cache: ColumnCache,
) -> Prepared:
    """Put every set through `with_reference`, and say who the reference is."""
    name = getattr(policy.config, "name_or_path", "") or "the model"
    ranks = Ranks.here(args.device)
    if ranks.count > 1:  # each set is scored together, so all must have the same ones
        sets = (prepared.train, prepared.clean, prepared.evaluation)
        told = [pairs and fingerprint_tokens(pairs) for pairs in sets]
        require_same_start(ranks, "the data", json.dumps(told))
    adapter = "with the adapter it came with" if isinstance(policy, PeftModel) else "alone"
    logger.info("reference: %s %s, before the first step", name, adapter)
    return prepared.map(
        lambda pairs, which: with_reference(
            policy, pairs, args, policy_fingerprint, collate, f"reference, {which}", cache
        )
    )


def with_reference(
    policy: nn.Module,
    pairs: Dataset,
    args: MSPOConfig,
    policy_fingerprint: str,
    collate: Collate,
    what: str,
    cache: ColumnCache,
) -> Dataset:
    """Add `ref_chosen_logp`, `ref_rejected_logp`, `starting_ppl_diff` and `SIGNALS` to every pair.

    The pass over the pairs is done once, in parts, and resumes where it was interrupted. Parts are
    kept on disk under a hash of the token ids (so of data, tokenizer and length), the policy's
    weights, the precision and `ppl_scope`; a file that is damaged is made again.

    Args:
        policy: the policy before its first step.
        pairs: tokenized pairs.
        args: the run's options.
        policy_fingerprint: `fingerprint_weights(policy)`.
        collate: how pairs become batches.
        what: what the progress bar says.
        cache: where parts are kept.
    """
    starts = range(0, len(pairs), PART)

    def read() -> Iterator[pa.RecordBatch]:
        for i, start in enumerate(starts, start=1):
            columns = _part(
                policy, pairs.select(range(start, min(start + PART, len(pairs)))), args,
                policy_fingerprint, collate,
                f"{what}, part {i} of {len(starts)}" if len(starts) > 1 else what, cache,
            )  # fmt: skip
            yield as_arrow(columns)

    parts = read()
    first = next(parts)
    return concatenate_datasets([pairs, store_batches(chain([first], parts), first.schema)], axis=1)


def as_arrow(columns: dict[str, Tensor]) -> pa.RecordBatch:
    """Return columns, numbers (n,) as float64 and vectors (n, K) as float16."""
    arrays: dict[str, pa.Array] = {}
    for name, values in columns.items():
        if values.ndim == 1:
            arrays[name] = pa.array(values.double().numpy())
        else:
            numbers = pa.array(values.half().flatten().numpy())
            arrays[name] = pa.FixedSizeListArray.from_arrays(numbers, values.shape[1])
    return pa.RecordBatch.from_pydict(arrays)


def _part(
    policy: nn.Module,
    pairs: Dataset,
    args: MSPOConfig,
    policy_fingerprint: str,
    collate: Collate,
    what: str,
    cache: ColumnCache,
) -> dict[str, Tensor]:
    """Return the columns of one part, (n, ...) each, from disk or by a pass over its pairs."""
    tokens, precision = fingerprint_tokens(pairs), str(args.bf16)
    made_of = [FORMAT, tokens, policy_fingerprint, precision, args.ppl_scope]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    names = (*COLUMNS, *SIGNALS)
    columns = cache.read(key, names, len(pairs))
    ranks = Ranks.here(args.device)
    if ranks.any(flag=columns is None):  # then all score, for each has its share of the batches
        with half_depth(policy) as states:

            def read(batch: PairBatch) -> dict[str, Tensor]:
                measured, signals = read_pairs(policy, batch, args.ppl_scope, states)
                logps = (measured.chosen_logp, measured.rejected_logp, measured.ppl_diff)
                return dict(zip(COLUMNS, logps, strict=True)) | signals

            columns = pass_over(
                policy,
                pairs,
                read,
                batch_size=args.per_device_eval_batch_size,
                bf16=args.bf16,
                collate=collate,
                what=what,
                ranks=ranks,
            )
        _require_finite(columns, pairs, what)
        cache.write(key, columns)
    assert columns is not None
    return {name: columns[name] for name in names}


def _require_finite(columns: dict[str, Tensor], pairs: Dataset, what: str) -> None:
    each = [values.isfinite().reshape(len(values), -1).all(1) for values in columns.values()]
    finite = torch.stack(each).all(0)
    if not finite.all():
        uids = [pairs[i]["uid"] for i in (~finite).nonzero().flatten().tolist()[:10]]
        raise UsageError(
            f"{what}: the model's log-probabilities are not finite for {int((~finite).sum())} "
            f"pairs, the first of them {', '.join(uids)}: remove them, or fix the model."
        )


def fingerprint_tokens(pairs: Dataset) -> str:
    """Return a hash of the pairs' token ids, and of labels of their own, in their order."""
    columns = [*PARTS, *({"given_label"} & set(pairs.column_names))]
    digest = hashlib.sha256()
    for rows in pairs.select_columns(columns).iter(1000):
        digest.update(json.dumps([rows[column] for column in columns]).encode())
    return digest.hexdigest()[:32]


def fingerprint_weights(policy: nn.Module) -> str:
    """Return a hash of the policy's config and of every parameter's name, dtype and bytes.

    Shards are gathered, a tensor at a time, so that a sharded model has the hash of the whole one.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = cast(PretrainedConfig, policy.config).to_dict()
    for name in ("_name_or_path", "distributed_config"):  # where it lies makes no difference
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in policy.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        numbers = whole(parameter.detach()).cpu().contiguous().flatten()
        digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.hexdigest()
