"""What an audit says of a whole set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from softpref.auditing.beliefs import SUSPECT, UNSURE, Beliefs, length_auroc, longer_is_chosen
from softpref.auditing.opinions import AskedJudge
from softpref.auditing.scores import Scored
from softpref.auditing.warnings import warnings_about
from softpref.data.readers import column
from softpref.data.sources import by_source
from softpref.statistics.noise_rate import NoiseRate, rate_text
from softpref.training.metrics import auroc


@dataclass(frozen=True)
class SourceNoise:
    """The share of wrong labels of one source, with its 95% interval.

    Attributes:
        source: the file, as it was named.
        pairs: audited pairs from it.
        noise_rate: as in `Summary`.
        noise_rate_low: lower end of the interval.
        noise_rate_high: its upper end.
    """

    source: str
    pairs: int
    noise_rate: float | None
    noise_rate_low: float
    noise_rate_high: float

    def __str__(self) -> str:
        rate = rate_text(self.noise_rate, self.noise_rate_low, self.noise_rate_high)
        return f"wrong labels among the {self.pairs:,} pairs of {self.source}: {rate}"


@dataclass(frozen=True)
class Summary:
    """What an audit says of a whole set; shares are in [0, 1].

    Attributes:
        pairs: audited pairs, the trusted ones not among them.
        clean_pairs: trusted pairs.
        clean_provenance: where the trust is from.
        noise_rate: share of wrong labels; None where its 95% interval, `noise_rate_low` to
            `noise_rate_high`, is wider than 15 points, or evidence does not speak.
        expected_wrong_labels: so many of the pairs; likewise.
        suspect: pairs more likely labelled wrong than right.
        unsure: others that are worth a look.
        signals: what the evidence is made of.
        evidence_speaks: whether it tells right labels from wrong ones; if not, nothing is claimed
            of any single pair.
        trusted_auroc: how often a trusted pair as given has more evidence than one swapped, by
            fits that left it out; 1/2 where evidence says nothing.
        length_auroc: the same by length alone, longer or shorter, whichever does better.
        ece: calibration error of `p_correct`, on trusted pairs that its fit left out; None where
            evidence does not speak.
        reliability: the curve behind it; likewise empty.
        auroc: of `p_correct` against the truth; null where `is_flipped` is not known.
        longer_is_chosen: share of pairs whose longer response is the one labelled better.
        doubted_clean: uids of trusted pairs that look wrong.
        warnings: what to mind before anything else, in words.
        sources: of several sources, the noise rate of each; else empty.
        judge: who was asked about the pairs, what that cost, and of how many pairs it has no
            opinion, `without_opinion`; None where nobody was.
    """

    pairs: int
    clean_pairs: int
    clean_provenance: str
    noise_rate: float | None
    noise_rate_low: float
    noise_rate_high: float
    expected_wrong_labels: float | None
    suspect: int
    unsure: int
    signals: list[str]
    evidence_speaks: bool
    trusted_auroc: float
    length_auroc: float
    ece: float | None
    reliability: list[dict[str, float]]
    auroc: float | None
    longer_is_chosen: float
    doubted_clean: list[str]
    warnings: list[str]
    sources: list[SourceNoise] = field(default_factory=list)
    judge: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """Return what is written of it: of one source nothing by source, nothing of no judge."""
        written = asdict(self)
        if not self.sources:
            del written["sources"]
        if self.judge is None:
            del written["judge"]
        return written


def summarise(
    scored: Scored,
    beliefs: Beliefs,
    noise: NoiseRate,
    of_sources: Mapping[str, NoiseRate],
    signals: Sequence[str],
    provenance: str,
    judge: AskedJudge | None = None,
) -> Summary:
    """Return what an audit says of the whole set."""
    longer = longer_is_chosen(scored.pairs)
    suspect = int((beliefs.p_correct < SUSPECT).sum())
    if not beliefs.speaks:
        noise, of_sources = NoiseRate.unknown(), dict.fromkeys(of_sources, NoiseRate.unknown())
    return Summary(
        pairs=len(scored.pairs),
        clean_pairs=len(scored.clean),
        clean_provenance=provenance,
        noise_rate=noise.told,
        noise_rate_low=noise.low,
        noise_rate_high=noise.high,
        expected_wrong_labels=None if noise.told is None else noise.told * len(scored.pairs),
        suspect=suspect,
        unsure=int((beliefs.p_correct < UNSURE).sum()) - suspect,
        signals=list(signals),
        evidence_speaks=beliefs.speaks,
        trusted_auroc=beliefs.trusted_auroc,
        length_auroc=length_auroc(scored.clean),
        ece=beliefs.ece if beliefs.speaks else None,
        reliability=beliefs.reliability if beliefs.speaks else [],
        auroc=_auroc(scored.pairs, beliefs.rank),
        longer_is_chosen=longer,
        doubted_clean=[scored.clean[i]["uid"] for i in beliefs.doubted_clean],
        warnings=warnings_about(scored, beliefs, longer, provenance, judge),
        sources=_sources(scored.pairs, of_sources),
        judge=judge.record if judge else None,
    )


def how_far(summary: Summary) -> str:
    """Return in words how well evidence tells right labels from wrong ones, beside length alone."""
    skill = (
        f"AUROC {summary.trusted_auroc:.3f} on trusted pairs that its fit left out, "
        f"{summary.length_auroc:.3f} by length alone"
    )
    if summary.evidence_speaks:
        return skill
    return (
        "nothing in the data tells right labels from wrong, so nothing is claimed of any pair "
        f"({skill})"
    )


def _sources(pairs: Dataset, rates: Mapping[str, NoiseRate]) -> list[SourceNoise]:
    sizes = {name: len(part) for name, part in by_source(pairs, "")}
    return [
        SourceNoise(name, sizes[name], rate.told, rate.low, rate.high)
        for name, rate in rates.items()
    ]


def _auroc(pairs: Dataset, rank: Tensor) -> float | None:
    if "is_flipped" not in pairs.column_names:
        return None
    is_flipped = torch.tensor(column(pairs, "is_flipped").to_numpy())
    both = 0 < int(is_flipped.sum()) < len(is_flipped)
    return auroc(rank.double(), ~is_flipped) if both else None
