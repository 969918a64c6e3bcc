"""Warnings about an audit or its data."""

from __future__ import annotations

from softpref.auditing.beliefs import PairBeliefs
from softpref.auditing.opinions import JudgeSummary
from softpref.auditing.scores import ScoredSets
from softpref.data.splits import ASSUMED_CORRECT

FEW_CLEAN_PAIRS = 100
LENGTH_EXPLAINS = 0.7
DOUBTED_SHARE = 0.1


def warnings_about(
    scored: ScoredSets,
    beliefs: PairBeliefs,
    longer_is_chosen: float,
    provenance: str,
    judge: JudgeSummary | None = None,
) -> list[str]:
    """Return the warnings, most serious first.

    Args:
        scored: the pairs and their scores.
        beliefs: how reliable their labels are.
        longer_is_chosen: share of pairs whose longer response is labelled better.
        provenance: why the trusted pairs are trusted.
        judge: the judge's part in the audit, if there was one.
    """
    doubted_clean = len(beliefs.doubted_clean)
    clean = len(scored.clean)
    found = []
    if provenance == ASSUMED_CORRECT:
        found.append(
            "the trusted pairs were not reviewed, only assumed to be labelled right: review the "
            "report's random sample, export clean.jsonl, and audit with that file as the clean set"
        )
    if not beliefs.speaks:
        found.append(
            "this model cannot distinguish right labels from wrong ones: in cross-validation it "
            "predicts trusted labels no better than chance; do not act on single pairs; check the "
            "trusted pairs, add more of them, or try another model"
        )
    elif beliefs.is_misled:
        found.append(
            "this model's strongest preferences are wrong more often than its weaker ones; ranks "
            "allow for that, but shares and probabilities are less certain than they look, and "
            "MSPO, which sees the same number, may learn wrong labels"
        )
    if clean < FEW_CLEAN_PAIRS:
        found.append(
            f"{clean} trusted pairs, {scored.clean_source}, are few: the numbers below need about "
            "150 to be precise"
        )
    if doubted_clean > DOUBTED_SHARE * clean:
        found.append(
            f"the evidence contradicts {doubted_clean} of the {clean} trusted pairs, "
            f"{scored.clean_source}: review them (doubted_clean in summary.json); wrong ones "
            "among them spoil the whole audit"
        )
    found += _data_warnings(scored, longer_is_chosen)
    if judge and judge.without_opinion:
        found.append(
            f"the {judge.name} failed on {judge.without_opinion} of {judge.pairs} pairs of "
            f"{scored.source} and {scored.clean_source}, which are audited without its opinion: "
            "retry_failed asks again"
        )
    return found


def _data_warnings(scored: ScoredSets, longer_is_chosen: float) -> list[str]:
    found = []
    if scored.sft_targets:
        found.append(
            f"the model was fine-tuned on responses of {scored.sft_targets} of the "
            f"{len(scored.pairs)} pairs of {scored.source} and finds them likely, right or wrong: "
            "audit with a model that has not seen them"
        )
    if max(longer_is_chosen, 1 - longer_is_chosen) >= LENGTH_EXPLAINS:
        which, share = "longer", longer_is_chosen
        if longer_is_chosen < 0.5:
            which, share = "shorter", 1 - longer_is_chosen
        found.append(
            f"the {which} response is the one labelled better in {share:.0%} of the pairs "
            f"of {scored.source}: length alone explains most labels"
        )
    if scored.contradicting:
        counts = ", ".join(f"{count} in {files}" for files, count in scored.contradicting.items())
        found.append(f"pairs are labelled both ways, so one of the two labels is wrong: {counts}")
    return found
