"""Reference log-probs: computed once by the starting policy, kept on disk, read ever after.

Shapes: n pairs of a data set.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig

from softpref.algorithm.ranks import Ranks
from softpref.algorithm.shards import whole
from softpref.data.batches import PARTS, Collate
from softpref.data.readers import store
from softpref.errors import UsageError
from softpref.training.config import MSPOConfig
from softpref.training.drift import require_same_start
from softpref.training.output import read_columns, write_columns
from softpref.training.preparation import Prepared
from softpref.training.scoring import score_pairs

logger = logging.getLogger(__name__)

COLUMNS = ("ref_chosen_logp", "ref_rejected_logp", "starting_ppl_diff")
PART = 2000
"""Pairs that are kept together: an interrupted pass repeats at most this many."""


def default_cache() -> Path:
    """Return softpref's directory in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "softpref" / "reference"


def sets_with_reference(
    policy: nn.Module,
    prepared: Prepared,
    args: MSPOConfig,
    policy_fingerprint: str,
    collate: Collate,
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
            policy, pairs, args, policy_fingerprint, collate, f"reference, {which}"
        )
    )


def with_reference(
    policy: nn.Module,
    pairs: Dataset,
    args: MSPOConfig,
    policy_fingerprint: str,
    collate: Collate,
    what: str,
) -> Dataset:
    """Add `ref_chosen_logp`, `ref_rejected_logp` and `starting_ppl_diff` to every pair.

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
    """
    starts = range(0, len(pairs), PART)

    def scored() -> Iterator[dict[str, float]]:
        for i, start in enumerate(starts, start=1):
            columns = _part(
                policy, pairs.select(range(start, min(start + PART, len(pairs)))), args,
                policy_fingerprint, collate,
                f"{what}, part {i} of {len(starts)}" if len(starts) > 1 else what,
            )  # fmt: skip
            for row in zip(*(columns[name].tolist() for name in COLUMNS), strict=True):
                yield dict(zip(COLUMNS, row, strict=True))

    schema = pa.schema([(name, pa.float64()) for name in COLUMNS])
    return concatenate_datasets([pairs, store(scored(), schema)], axis=1)


def _part(
    policy: nn.Module,
    pairs: Dataset,
    args: MSPOConfig,
    policy_fingerprint: str,
    collate: Collate,
    what: str,
) -> dict[str, Tensor]:
    """Return the columns of one part, (n,) each, from disk or by a pass over its pairs."""
    made_of = [fingerprint_tokens(pairs), policy_fingerprint, str(args.bf16), args.ppl_scope]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    cache = Path(args.reference_cache) if args.reference_cache else default_cache()
    path = cache / f"{key}.safetensors"
    columns = read_columns(path, COLUMNS, len(pairs))
    ranks = Ranks.here(args.device)
    if ranks.any(flag=columns is None):  # then all score, for each has its share of the batches
        scored = score_pairs(
            policy,
            pairs,
            ppl_scope=args.ppl_scope,
            batch_size=args.per_device_eval_batch_size,
            bf16=args.bf16,
            collate=collate,
            what=what,
            ranks=ranks,
        )
        values = (scored.chosen_logp, scored.rejected_logp, scored.ppl_diff)
        columns = dict(zip(COLUMNS, values, strict=True))
        _require_finite(columns, pairs, what)
        write_columns(path, columns)
    assert columns is not None
    return columns


def _require_finite(columns: dict[str, Tensor], pairs: Dataset, what: str) -> None:
    finite = torch.stack([values.isfinite() for values in columns.values()]).all(0)
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
