"""From tokenized pairs with their readings to what they say about the labels.

Shapes: n pairs of a data set, m trusted pairs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator
from typing import Literal, get_args

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from softpref.data.label_columns import labelled, ties
from softpref.data.parsing import ANNOTATOR
from softpref.data.readers import column
from softpref.models.scoring import numbers, token_counts
from softpref.statistics.evidence import Evidence, fit_evidence
from softpref.statistics.pair_signals import PairSignals
from softpref.training.annotators import placed
from softpref.training.preparation import Prepared

logger = logging.getLogger(__name__)

SignalName = Literal["ppl_diff", "length", "content"]
SIGNAL_NAMES: tuple[SignalName, ...] = get_args(SignalName)
OPINION = "opinion of "
"""How columns begin in which others say what they think of a pair, chosen less rejected."""
MOST_FITTED = 10_000
"""Noisy pairs in the fit: more of them change little, and cost time and memory."""
PAIRS_PER_CHUNK = 10_000


def signals_of(pairs: Dataset, names: Collection[SignalName]) -> PairSignals:
    """Return the signals that a pass with `softpref.models.reading` has left in the columns.

    Odd: `ppl_diff` is in every choice; `length` adds differences of length and of summed
    log-probabilities, `content` the difference of mean hidden states. Even, with either: how likely
    the likelier and the less likely response is, the spread of token surprise in each, their
    length, likeness, distance and overlap. Columns named `OPINION` are odd signals too.
    """

    def known(name: str) -> Tensor:
        return numbers(pairs, name).double()

    fluency = -known("starting_ppl_diff")
    lengths = [token_counts(pairs, part).double() for part in ("chosen_ids", "rejected_ids")]
    logps = [known("ref_chosen_logp"), known("ref_rejected_logp")]
    odd: dict[str, Tensor] = {}
    if "length" in names:
        odd["length"] = lengths[0] - lengths[1]
        odd["length_ratio"] = (lengths[0] / lengths[1]).log()
        odd["log_probability"] = logps[0] - logps[1]
        odd["ppl_diff"] = fluency
    if "content" in names:
        odd["content"] = states(pairs)
    odd |= {name: known(name) for name in pairs.column_names if name.startswith(OPINION)}
    if not odd:
        return PairSignals(fluency, {}, {})
    means = [logp / length for logp, length in zip(logps, lengths, strict=True)]
    spreads = [known("chosen_spread"), known("rejected_spread")]
    likelier = means[0] > means[1]
    even: dict[str, Tensor] = {
        "likelier": torch.maximum(*means),
        "less_likely": torch.minimum(*means),
        "spread_of_likelier": torch.where(likelier, spreads[0], spreads[1]),
        "spread_of_less_likely": torch.where(likelier, spreads[1], spreads[0]),
        "tokens": lengths[0] + lengths[1],
        **{name: known(name) for name in ("likeness", "distance", "overlap")},
    }
    return PairSignals(fluency, odd, even)


def states(pairs: Dataset) -> Tensor:
    """Return the differences of mean hidden states, (n, S) float32."""
    flat = [part.flatten().to_numpy() for part in column(pairs, "state").chunks]
    return torch.from_numpy(np.concatenate(flat)).float().reshape(len(pairs), -1)


def evidence_of(
    noisy: Dataset, trusted: Dataset, names: Collection[SignalName], seed: int
) -> tuple[Evidence, Tensor]:
    """Fit evidence on both sets; return it and g of every noisy pair, nats, (n,).

    Pairs in the fit have the g of a fit that left them out, and where annotators are named, all
    labels of the same two responses.
    """
    fitted = _in_fit(len(noisy), seed)
    sample = noisy if len(fitted) == len(noisy) else noisy.select(fitted.tolist())
    content = placed(sample)[0] if ANNOTATOR in sample.column_names else None
    evidence = fit_evidence(signals_of(sample, names), signals_of(trusted, names), seed, content)
    if sample is noisy:
        return evidence, evidence.noisy
    g = torch.cat([evidence.log_odds(signals_of(part, names)) for part in chunks(noisy)])
    g[fitted] = evidence.noisy
    return evidence, g


def with_evidence(prepared: Prepared, clean: Dataset, seed: int) -> tuple[Prepared, Evidence]:
    """Fit evidence and add it, g in nats, to training and clean pairs as the column `evidence`.

    A tie has none, 0, and no pair has any where evidence does not speak.
    """
    tied = torch.tensor(ties(prepared.train))
    evidence, of_labelled = evidence_of(labelled(prepared.train), clean, SIGNAL_NAMES, seed)
    g = torch.zeros(len(tied), dtype=of_labelled.dtype)
    g[~tied] = of_labelled * evidence.speaks
    if evidence.speaks:
        logger.info("evidence: the signals distinguish right labels from wrong")
    else:
        logger.warning("evidence: nothing in the data distinguishes right labels from wrong")
    train = prepared.train.add_column("evidence", g.numpy())
    clean = clean.add_column("evidence", (evidence.trusted * evidence.speaks).numpy())
    return dataclasses.replace(prepared, train=train, clean=clean), evidence


def parts_of(
    evidence: Evidence, noisy: Dataset, names: Collection[SignalName], seed: int
) -> dict[str, Tensor]:
    """Return what each kind of signal adds to the g that `evidence_of` gave, nats, (n,) each."""
    by_chunk = [evidence.parts(signals_of(part, names)) for part in chunks(noisy)]
    parts = {name: torch.cat([part[name] for part in by_chunk]) for name in by_chunk[0]}
    fitted = _in_fit(len(noisy), seed)
    for name, values in parts.items():
        values[fitted] = evidence.noisy_parts[name]
    return parts


def rates_of(evidence: Evidence, noisy: Dataset, names: Collection[SignalName]) -> Tensor:
    """Return ε of every noisy pair, (n,)."""
    return torch.cat([evidence.rates(signals_of(part, names)) for part in chunks(noisy)])


def _in_fit(noisy: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(noisy, generator=generator)[:MOST_FITTED].sort().values


def chunks(pairs: Dataset, size: int = PAIRS_PER_CHUNK) -> Iterator[Dataset]:
    """Yield the pairs in parts that fit into memory whatever a state is."""
    for start in range(0, len(pairs), size):
        yield pairs.select(range(start, min(start + size, len(pairs))))
