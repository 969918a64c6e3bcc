"""The audit's summary of a whole set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset
from torch import Tensor

from softpref.auditing.beliefs import SUSPECT, UNSURE, PairBeliefs, length_auroc, longer_is_chosen
from softpref.auditing.explanations import NO_EVIDENCE
from softpref.auditing.opinions import JudgeSummary
from softpref.auditing.scores import ScoredSets
from softpref.auditing.warnings import warnings_about
from softpref.data.sources import by_source
from softpref.models.scoring import numbers
from softpref.statistics.annotators import Reliability, reliability_text
from softpref.statistics.noise_rate import NoiseRate, rate_text
from softpref.training.metrics import auroc

LISTED_ANNOTATORS = 10
WITHOUT_EVIDENCE = (
    f"annotators: {NO_EVIDENCE}, so only labels of trusted pairs, and of the same pairs by several "
    "annotators, say how often each is right; labels are taken to be right more often than wrong"
)


@dataclass(frozen=True)
class SourceNoise:
    """The share of wrong labels of one source, with its 95% interval.

    Attributes:
        source: the file, as given.
        pairs: number of audited pairs from it.
        noise_rate: as in `Summary`.
        noise_rate_low: lower end of the interval.
        noise_rate_high: upper end of the interval.
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
class AnnotatorSummary:
    """How often an annotator's labels are right, with a 95% interval.

    Attributes:
        annotator: the name.
        pairs: number of pairs labelled, trusted ones included; a repeated label counts once.
        reliability: share of right labels; None if the interval is wider than 15 points.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    annotator: str
    pairs: int
    reliability: float | None
    low: float
    high: float

    def __str__(self) -> str:
        share = reliability_text(self.reliability, self.low, self.high)
        return f"right labels among the {self.pairs:,} pairs of annotator {self.annotator}: {share}"


@dataclass(frozen=True)
class Summary:
    """An audit's numbers about a whole set; shares are in [0, 1].

    Attributes:
        pairs: number of audited pairs, without the trusted ones.
        clean_pairs: number of trusted pairs.
        clean_provenance: why the trusted pairs are trusted.
        noise_rate: share of wrong labels; None if its 95% interval, `noise_rate_low` to
            `noise_rate_high`, is wider than 15 points, or evidence is uninformative.
        expected_wrong_labels: the same as a number of pairs.
        suspect: number of pairs that are more likely labelled wrong than right.
        unsure: number of other pairs that need review.
        signals: signals behind the evidence.
        evidence_speaks: whether evidence distinguishes right labels from wrong ones; if not, the
            audit claims nothing about single pairs.
        trusted_auroc: how often a trusted pair as given has more evidence than a swapped one, in
            cross-validation; 1/2 if evidence is uninformative.
        length_auroc: the same by length alone, longer or shorter, whichever is better.
        ece: cross-validated calibration error of `p_correct` on trusted pairs; None if evidence is
            uninformative.
        reliability: the calibration curve; empty if evidence is uninformative.
        auroc: of `p_correct` against the truth; None if `is_flipped` is unknown.
        longer_is_chosen: share of pairs whose longer response is the one labelled better.
        doubted_clean: uids of trusted pairs that look wrong.
        warnings: problems with the audit or its data, most serious first.
        sources: noise rate by source; empty with one source.
        annotators: reliability by annotator; empty if the data name none.
        judge: the judge, what it cost, and its number of pairs `without_opinion`; None without a
            judge.
        ties: number of ties, which are not audited.
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
    annotators: list[AnnotatorSummary] = field(default_factory=list)
    judge: dict[str, Any] | None = None
    ties: int = 0

    def record(self) -> dict[str, Any]:
        """Return the contents of `summary.json`, without what is optional and missing."""
        optional = ("sources", "annotators", "judge", "ties")
        return {name: of for name, of in asdict(self).items() if of or name not in optional}


def summarise(
    scored: ScoredSets,
    beliefs: PairBeliefs,
    noise: NoiseRate,
    source_noise: Mapping[str, NoiseRate],
    signals: Sequence[str],
    provenance: str,
    judge: JudgeSummary | None = None,
    annotators: Mapping[str, Reliability] | None = None,
    ties: int = 0,
) -> Summary:
    """Return the summary of an audit."""
    longer = longer_is_chosen(scored.pairs)
    suspect = int((beliefs.p_correct < SUSPECT).sum())
    if not beliefs.speaks:
        noise = NoiseRate.unknown()
        source_noise = dict.fromkeys(source_noise, noise)
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
        sources=_sources(scored.pairs, source_noise),
        annotators=[
            AnnotatorSummary(name, of.labels, of.known, of.low, of.high)
            for name, of in (annotators or {}).items()
        ],
        judge=judge.record if judge else None,
        ties=ties,
    )


def evidence_skill(summary: Summary) -> str:
    """Describe how well evidence, and length alone, separate right labels from wrong ones."""
    skill = (
        f"AUROC {summary.trusted_auroc:.3f} on trusted pairs in cross-validation, "
        f"{summary.length_auroc:.3f} by length alone"
    )
    if summary.evidence_speaks:
        return skill
    return f"{NO_EVIDENCE}, so nothing is claimed about any pair ({skill})"


def annotator_lines(summary: Summary) -> list[str]:
    """Return a line for each annotator, at most the ten with most pairs, least reliable first.

    The first line says what is assumed where evidence does not speak.
    """
    listed = sorted(summary.annotators, key=lambda each: -each.pairs)[:LISTED_ANNOTATORS]
    lines = [str(each) for each in sorted(listed, key=lambda each: each.low + each.high)]
    if lines and not summary.evidence_speaks:
        lines.insert(0, WITHOUT_EVIDENCE)
    if more := len(summary.annotators) - len(listed):
        lines.append(f"and {more:,} other annotators, see summary.json")
    return lines


def _sources(pairs: Dataset, rates: Mapping[str, NoiseRate]) -> list[SourceNoise]:
    sizes = {name: len(part) for name, part in by_source(pairs, "")}
    return [
        SourceNoise(name, sizes[name], rate.told, rate.low, rate.high)
        for name, rate in rates.items()
    ]


def _auroc(pairs: Dataset, rank: Tensor) -> float | None:
    if "is_flipped" not in pairs.column_names:
        return None
    is_flipped = numbers(pairs, "is_flipped")
    both = 0 < int(is_flipped.sum()) < len(is_flipped)
    return auroc(rank.double(), ~is_flipped) if both else None
