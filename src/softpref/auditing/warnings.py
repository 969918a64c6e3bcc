"""What is wrong with an audit or its data, in words, before anybody acts on it."""

from __future__ import annotations

from softpref.auditing.beliefs import Beliefs
from softpref.auditing.opinions import AskedJudge
from softpref.auditing.scores import Scored

FEW_CLEAN_PAIRS = 100
LENGTH_EXPLAINS = 0.7
DOUBTED_SHARE = 0.1


def warnings_about(
    scored: Scored,
    beliefs: Beliefs,
    longer_is_chosen: float,
    provenance: str,
    judge: AskedJudge | None = None,
) -> list[str]:
    """Return the warnings, the gravest first.

    Args:
        scored: the pairs and their scores.
        beliefs: what is believed of each.
        longer_is_chosen: share of pairs whose longer response is labelled better.
        provenance: where the trust in the trusted pairs is from.
        judge: who was asked about the pairs, if anybody.
    """
    doubted_clean = len(beliefs.doubted_clean)
    clean = len(scored.clean)
    found = []
    if not beliefs.speaks:
        found.append(
            "this model cannot tell right from wrong labels: trusted pairs that a fit left out are "
            "foretold no better than by a toss; do not act on single pairs; check the trusted "
            "pairs, give more of them, or try another model"
        )
    if beliefs.is_misled:
        found.append(
            "this model is fluent in what it gets wrong: its strongest preferences are not its "
            "rightest ones; ranks follow that, but shares and probabilities are less sure than "
            "they look, and MSPO, which sees the same number, may learn the wrong ones"
        )
    if "not reviewed" in provenance:
        found.append(
            "the trusted pairs were assumed to be labelled right, nobody reviewed them: review "
            "the report's random sample, export clean.jsonl, and audit with that as --clean"
        )
    if clean < FEW_CLEAN_PAIRS:
        found.append(
            f"{clean} trusted pairs, {scored.clean_source}, are few: about 150 make the numbers "
            "below worth their digits"
        )
    if doubted_clean > DOUBTED_SHARE * clean:
        found.append(
            f"the evidence contradicts {doubted_clean} of the {clean} trusted pairs, "
            f"{scored.clean_source}: look at them (doubted_clean in summary.json); wrong ones "
            "among them spoil the whole audit"
        )
    found += _of_data(scored, longer_is_chosen)
    if judge and judge.without_opinion:
        found.append(
            f"the {judge.name} failed on {judge.without_opinion} of {judge.pairs} pairs of "
            f"{scored.source} and {scored.clean_source}, which go without its opinion: "
            "--retry_failed true asks again"
        )
    return found


def _of_data(scored: Scored, longer_is_chosen: float) -> list[str]:
    found = []
    if scored.sft_targets:
        found.append(
            f"the model was fine-tuned on responses of {scored.sft_targets} of the "
            f"{len(scored.pairs)} pairs of {scored.source}: it finds them likely, right or wrong; "
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
        found.append(f"pairs are labelled both ways, so that one label is wrong: {counts}")
    return found
