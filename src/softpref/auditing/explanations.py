"""What the signals say of each pair, in nats and in words.

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
"""What a user is told of each kind of columns of the model; opinions stand for themselves."""
WORDS = {"fluency": "fluency", "length": "length", "content": "what the responses say"}
_NAMED = 2
"""Trusted pairs that are named beside a pair."""
HARDLY = 0.2
"""Nats below which evidence is next to none: a probability of 55%."""
PAIRS_EXPLAINED_AT_ONCE = 1000
"""What every trusted pair adds to these is held at once."""


@dataclass(frozen=True)
class Explained:
    """What was found of every pair, and why.

    Attributes:
        evidence: what each of `KINDS` in use adds to a label's log-odds, nats, (n,) each; 0 where
            evidence does not speak.
        closest: (n, 2) places of the trusted pairs that add most to what is found; (n, 0) where
            none adds anything.
    """

    evidence: Mapping[str, Tensor]
    closest: Tensor

    @property
    def log_odds(self) -> Tensor:
        """Return the sum of the evidence, nats, (n,)."""
        return torch.stack(list(self.evidence.values())).sum(0)


def explain(
    evidence: Evidence, pairs: Dataset, names: Collection[SignalName], seed: int
) -> Explained:
    """Take the evidence of every pair apart.

    Args:
        evidence: fitted by `softpref.training.evidence.evidence_of` on these pairs.
        pairs: the audited pairs.
        names: the signals, as in that fit.
        seed: likewise.
    """
    summed: dict[str, Tensor] = {}
    for name, part in parts_of(evidence, pairs, names, seed).items():
        kind = _KINDS.get(name, name)
        summed[kind] = summed[kind] + part if kind in summed else part
    found = {kind: summed[kind] for kind in dict.fromkeys([*WORDS, *summed]) if kind in summed}
    if not evidence.speaks:
        found = {kind: torch.zeros_like(nats) for kind, nats in found.items()}
    explained = Explained(found, torch.empty(len(pairs), 0, dtype=torch.int64))
    if not (evidence.speaks and evidence.pull.any()):
        return explained
    sign = explained.log_odds.sign().split(PAIRS_EXPLAINED_AT_ONCE)
    closest = [
        (evidence.influence(signals_of(part, names)) * of_part[:, None]).topk(_NAMED).indices
        for part, of_part in zip(chunks(pairs, PAIRS_EXPLAINED_AT_ONCE), sign, strict=True)
    ]
    return Explained(found, torch.cat(closest))


def reason(
    evidence: Mapping[str, float], speaks: bool, closest: Sequence[int], labelled_otherwise: str
) -> str:
    """Return in plain words why a label is believed as it is.

    Args:
        evidence: what each kind adds to the label's log-odds, nats.
        speaks: whether evidence tells right labels from wrong ones at all.
        closest: rows of the trusted pairs that weigh most.
        labelled_otherwise: where the same two responses are labelled the other way round, "" for
            nowhere.
    """
    words = _in_words(evidence) if speaks else "nothing in the data tells right labels from wrong"
    if speaks and closest:
        words += f"; closest trusted pairs: rows {' and '.join(map(str, closest))}"
    if not labelled_otherwise:
        return words
    return f"{words}; the same two responses are labelled the other way round {labelled_otherwise}"


def words_of(kind: str) -> str:
    """Return what a kind of evidence is called in a sentence."""
    return f"the {kind}" if kind.startswith(OPINION) else WORDS[kind]


def _in_words(evidence: Mapping[str, float]) -> str:
    first, *others = sorted(evidence.items(), key=lambda part: -abs(part[1]))
    kind, nats = first
    if abs(nats) < HARDLY:
        parts = ", ".join(f"{words_of(kind)} {_signed(nats)}" for kind, nats in evidence.items())
        return f"hardly anything speaks for or against the label ({parts} nats)"
    side = "against" if nats < 0 else "for"
    words = [f"{words_of(kind)} speaks {side} the label ({_signed(nats)} nats)"]
    agree = all(abs(other) < HARDLY or (other < 0) == (nats < 0) for _, other in others)
    for kind, other in others:
        how = "too" if agree else "against it" if other < 0 else "for it"
        how = "hardly" if abs(other) < HARDLY else how
        words.append(f"{words_of(kind)} {how} ({_signed(other)})")
    return ", ".join(words)


def _signed(nats: float) -> str:
    return f"{round(nats, 1) + 0.0:+.1f}".replace("-", "−")


def labelled_otherwise(pairs: Dataset) -> Iterator[str]:
    """Yield for every pair where the same two responses are labelled the other way round.

    That is "elsewhere", of several sources the names of those where it is so, and "" for nowhere.
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
