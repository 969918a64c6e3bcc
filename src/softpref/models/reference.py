"""Reference log-probs: computed once by the starting policy, kept on disk, read ever after.

Shapes: n pairs of a data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from typing import cast

import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig

from softpref.algorithm.gradients.shards import whole
from softpref.algorithm.rows import OF_THE_PAIR, PairBatch
from softpref.data.column_cache import ColumnCache
from softpref.data.readers import store_batches
from softpref.data.tokens import PARTS
from softpref.errors import UsageError
from softpref.models.quantized import quantization_constants
from softpref.models.reading import half_depth, read_pairs
from softpref.models.scoring import Scorer

_COLUMNS = ("ref_chosen_logp", "ref_rejected_logp", "starting_ppl_diff")
SIGNAL_COLUMNS = ("likeness", "distance", "chosen_spread", "rejected_spread", "overlap", "state")
FORMAT = 2
"""Of a part on disk; another one is made again."""
PART = 2000
"""Pairs that are kept together: an interrupted pass repeats at most this many."""


def with_reference(
    scorer: Scorer, pairs: Dataset, policy_fingerprint: str, cache: ColumnCache, what: str
) -> Dataset:
    """Add reference log-probabilities, `starting_ppl_diff` and `SIGNAL_COLUMNS` to every pair.

    The pass over the pairs is done once, in parts, and resumes where it was interrupted. Parts are
    kept on disk under a hash of the token ids (so of data, tokenizer and length), the policy's
    weights, the precision and `ppl_scope`; a file that is damaged is made again.

    Args:
        scorer: has the policy before its first step.
        pairs: tokenized pairs.
        policy_fingerprint: `fingerprint_weights(scorer.policy)`.
        cache: where parts are kept.
        what: what the progress line says.
    """
    starts = range(0, len(pairs), PART)

    def read() -> Iterator[pa.RecordBatch]:
        for i, start in enumerate(starts, start=1):
            part = pairs.select(range(start, min(start + PART, len(pairs))))
            name = f"{what}, part {i} of {len(starts)}" if len(starts) > 1 else what
            yield as_arrow(_columns(scorer, part, policy_fingerprint, cache, name))

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


def _columns(
    scorer: Scorer, pairs: Dataset, policy_fingerprint: str, cache: ColumnCache, what: str
) -> dict[str, Tensor]:
    """Return the columns of one part, (n, ...) each, from disk or by a pass over its pairs."""
    tokens = fingerprint_tokens(pairs.select_columns([*PARTS]))
    precision = str(scorer.bf16)
    made_of = [FORMAT, tokens, policy_fingerprint, precision, scorer.ppl_scope]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    names = (*_COLUMNS, *SIGNAL_COLUMNS)
    columns = cache.read(key, names, len(pairs))
    if scorer.ranks.any(flag=columns is None):  # then all score, for each has its share
        with half_depth(scorer.policy) as states:

            def read(batch: PairBatch) -> dict[str, Tensor]:
                measured, signals = read_pairs(scorer.policy, batch, scorer.ppl_scope, states)
                logps = (measured.chosen_logp, measured.rejected_logp, measured.ppl_diff)
                return dict(zip(_COLUMNS, logps, strict=True)) | signals

            columns = scorer.read(pairs, read, what)
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
    """Return a hash of the pairs' token ids and of what they bring of their own, in order."""
    columns = [*PARTS, *(name for name in OF_THE_PAIR if name in pairs.column_names)]
    digest = hashlib.sha256()
    for rows in pairs.select_columns(columns).iter(1000):
        digest.update(json.dumps([rows[column] for column in columns]).encode())
    return digest.hexdigest()[:32]


def fingerprint_weights(policy: nn.Module) -> str:
    """Return a hash of the policy's config and of every parameter's name, dtype and bytes.

    Of adapters it is also which are active and how strongly, since all of them are parameters.
    Packed weights are hashed with their constants: models that differ by a factor pack alike.
    Shards are gathered, a tensor at a time, so that a sharded model has the hash of the whole one.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = cast(PretrainedConfig, policy.config).to_dict()
    # Where a model lies and what wrote it make no difference.
    for name in ("_name_or_path", "distributed_config", "transformers_version"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in chain(policy.named_parameters(), quantization_constants(policy)):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        numbers = whole(parameter.detach()).cpu().contiguous().flatten()
        digest.update(numbers.view(torch.uint8).numpy().data)
    for state in _adapter_states(policy):
        digest.update(json.dumps(state, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _adapter_states(policy: nn.Module) -> Iterator[list[object]]:
    """Yield of every adapted layer what decides whether its adapters count; none without any."""
    for name, layer in policy.named_modules():
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            scaling = dict(getattr(layer, "scaling", {}))
            active = list(layer.active_adapters)
            yield [name, layer.disable_adapters, list(layer.merged_adapters), active, scaling]
