"""Explain each label: the evidence by kind in nats, and a sentence about it.

Shapes: n audited pairs, m trusted pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from softpref.data.readers import dataset_rows
from softpref.data.seen_pairs import SeenPairs
from softpref.data.sources import by_source, content_key, contents, in_sorted_order
from softpref.statistics.evidence import Evidence
from softpref.training.evidence import OPINION, SignalName, chunks, parts_of, signals_of

_KINDS = {
    "curve": "fluency",
    "even": "fluency",
    "ppl_diff": "fluency",
    "log_probability": "length",
    "length": "length",
    "length_ratio": "length",
    "content": "content",
}
"""The kind that users see for each group of the model's columns; an opinion is a kind itself."""
KIND_NAMES = {"fluency": "fluency", "length": "length", "content": "what the responses say"}
NO_EVIDENCE = "nothing in the data distinguishes right labels from wrong ones"
_CLOSEST = 2
"""How many trusted pairs an explanation names."""
NEGLIGIBLE = 0.2
"""Evidence below this, in nats, is a probability below 55%."""
CHUNK_PAIRS = 1000
"""Memory grows with this number times the number of trusted pairs."""


@dataclass(frozen=True)
class Explanations:
    """The evidence about every pair, and the trusted pairs behind it.

    Attributes:
        evidence: what each kind in use adds to a label's log-odds, nats, (n,) each; 0 where
            evidence is uninformative.
        closest: (n, 2) indices of the trusted pairs that add most to the result; (n, 0) where none
            adds anything.
    """

    evidence: Mapping[str, Tensor]
    closest: Tensor

    @property
    def log_odds(self) -> Tensor:
        """Return the sum of the evidence, nats, (n,)."""
        return torch.stack(list(self.evidence.values())).sum(0)


def explain_pairs(
    evidence: Evidence, pairs: Dataset, names: Collection[SignalName], seed: int
) -> Explanations:
    """Return the evidence about every pair by kind, and the trusted pairs behind it.

    Args:
        evidence: fitted by `softpref.training.evidence.evidence_of` on these pairs.
        pairs: the audited pairs.
        names: the signals of that fit.
        seed: the seed of that fit.
    """
    summed: dict[str, Tensor] = {}
    for name, part in parts_of(evidence, pairs, names, seed).items():
        kind = _KINDS.get(name, name)
        summed[kind] = summed[kind] + part if kind in summed else part
    found = {kind: summed[kind] for kind in dict.fromkeys([*KIND_NAMES, *summed]) if kind in summed}
    if not evidence.speaks:
        found = {kind: torch.zeros_like(nats) for kind, nats in found.items()}
    explanations = Explanations(found, torch.empty(len(pairs), 0, dtype=torch.int64))
    if not (evidence.speaks and evidence.pull.any()):
        return explanations
    sign = explanations.log_odds.sign().split(CHUNK_PAIRS)
    closest = [
        (evidence.influence(signals_of(part, names)) * of_part[:, None]).topk(_CLOSEST).indices
        for part, of_part in zip(chunks(pairs, CHUNK_PAIRS), sign, strict=True)
    ]
    return Explanations(found, torch.cat(closest))


def explanation_text(
    evidence: Mapping[str, float], speaks: bool, closest: Sequence[int], opposite: str
) -> str:
    """Return a sentence that explains the belief about a label.

    Args:
        evidence: what each kind adds to the label's log-odds, nats.
        speaks: whether evidence distinguishes right labels from wrong ones at all.
        closest: rows of the trusted pairs that weigh most.
        opposite: where the same two responses are labelled the other way round, "" for nowhere.
    """
    text = _evidence_text(evidence) if speaks else NO_EVIDENCE
    if speaks and closest:
        text += f"; closest trusted pairs: rows {' and '.join(map(str, closest))}"
    if not opposite:
        return text
    return f"{text}; the same two responses are labelled the other way round {opposite}"


def kind_name(kind: str) -> str:
    """Return the name of a kind of evidence in a sentence."""
    return f"the {kind}" if kind.startswith(OPINION) else KIND_NAMES[kind]


def _evidence_text(evidence: Mapping[str, float]) -> str:
    first, *others = sorted(evidence.items(), key=lambda part: -abs(part[1]))
    kind, nats = first
    if abs(nats) < NEGLIGIBLE:
        parts = ", ".join(f"{kind_name(kind)} {_signed(nats)}" for kind, nats in evidence.items())
        return f"hardly anything speaks for or against the label ({parts} nats)"
    side = "against" if nats < 0 else "for"
    clauses = [f"{kind_name(kind)} speaks {side} the label ({_signed(nats)} nats)"]
    agree = all(abs(other) < NEGLIGIBLE or (other < 0) == (nats < 0) for _, other in others)
    for kind, other in others:
        how = "too" if agree else "against it" if other < 0 else "for it"
        how = "hardly" if abs(other) < NEGLIGIBLE else how
        clauses.append(f"{kind_name(kind)} {how} ({_signed(other)})")
    return ", ".join(clauses)


def _signed(nats: float) -> str:
    return f"{round(nats, 1) + 0.0:+.1f}".replace("-", "−")


def opposite_labels(pairs: Dataset) -> Iterator[str]:
    """Yield for every pair where the same two responses are labelled the other way round.

    A place is "elsewhere", or with several sources the names of those, or "" for nowhere.
    """
    seen: dict[str, SeenPairs] = {}
    for where, part in by_source(pairs, "elsewhere"):
        of = seen[where] = SeenPairs()
        for row in dataset_rows(contents(part)):
            ahead = in_sorted_order(row["chosen"], row["rejected"])
            of.add_order(content_key(**row), where, is_sorted=ahead)
    for row in dataset_rows(contents(pairs)):
        ahead, key = in_sorted_order(row["chosen"], row["rejected"]), content_key(**row)
        found = [where for where, of in seen.items() if of.orders(key)[1 if ahead else 0]]
        yield ("in " if found and len(seen) > 1 else "") + " and in ".join(found)
