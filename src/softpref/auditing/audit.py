"""`softpref audit`: how far to believe each label of a preference set, and what to do about it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset

from softpref.auditing.beliefs import believe
from softpref.auditing.explanations import explain
from softpref.auditing.export import CLEANED, EXPORTS, LeftOut, Trusted, read_marks, write_cleaned
from softpref.auditing.of_run import labels_of_run, of_run, require_same_pairs
from softpref.auditing.opinions import VERDICT_FILE, with_opinions, with_verdicts
from softpref.auditing.options import COLUMN_OPTIONS, DEFAULTS, AuditOptions
from softpref.auditing.pair_rows import LABELS, pair_rows
from softpref.auditing.report import REPORT, write_report
from softpref.auditing.scores import score_sets
from softpref.auditing.summary import Summary, how_far, summarise
from softpref.data.bad_rows import BadRow
from softpref.data.column_cache import ColumnCache
from softpref.data.readers import dataset_rows
from softpref.data.sources import load_pairs, names_of
from softpref.errors import UsageError
from softpref.judging.ask import make_judge
from softpref.judging.options import JudgeOptions, check_judge
from softpref.options import refuse_too_small, refuse_unknown_choices, require
from softpref.places import directory_to_write
from softpref.statistics.noise_rate import rate_text
from softpref.training.align import AlignFiles, load_sets
from softpref.training.evidence import SIGNAL_NAMES, SignalName, evidence_of, rates_of
from softpref.training.needs import noise_by_source
from softpref.training.output import (
    appearing_together,
    is_unfinished,
    one_writer,
    write_lines,
    write_text,
)

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Audit:
    """An audit's result.

    Attributes:
        pairs: a row a pair, in the order of the data: `uid`, `row`, of several files `source`,
            `ppl_diff` (nats per token), `soft_label` (null without a run), `p_correct`, `margin`
            (nats) and `step` (of the run), `rank` (1: most suspect), `evidence` (for the label,
            nats, by what it comes from), `flag` (`suspect`, `unsure`, `fine`), `why`.
        summary: of the set.
        texts: the same pairs' prompts and responses.
        trusted: the trusted pairs.
        fingerprint: of the data.
        unused: rows of the data that could not be used, with reasons.
    """

    pairs: Dataset
    summary: Summary
    texts: Dataset
    trusted: Trusted
    fingerprint: str
    unused: tuple[BadRow, ...]


def run_audit(options: AuditOptions, judge: JudgeOptions | None = None) -> None:
    """Audit a set and write `labels.jsonl`, `summary.json`, `report.html` and `cleaned.jsonl`.

    Raises:
        UsageError: an option is wrong or missing, or data, model or judge cannot be used; then
            nothing is written but the verdicts that the judge has given by then. Or the audit is
            written, and `export` acts on suspects that evidence does not know.
    """
    require(options.output, "--output")
    output = directory_to_write(options.output)
    _refuse_other_contents(output)
    asked = _asked(options)
    marks = _marks_of(options.marks, asked) if options.marks else {}
    with one_writer(output):
        done = _audit(asked, options, judge)
        acts = done.summary.evidence_speaks or options.force
        export = (options.export or "soft") if acts else "keep"
        with appearing_together(output, SUMMARY) as home:
            write_lines(home / LABELS, dataset_rows(done.pairs))
            write_text(home / SUMMARY, json.dumps(done.summary.record(), indent=1) + "\n")
            write_report(
                home / REPORT, done.pairs, done.texts, done.summary, done.fingerprint, asked.seed
            )
            left_out = write_cleaned(
                asked.data, home, done.pairs, done.trusted, export, marks, asked.columns(),
                done.unused,
            )  # fmt: skip
    if marks:
        certain = sum(marks.get(uid) is not None for uid in done.pairs["uid"])
        unsure = sum(mark is None for mark in marks.values())
        logger.info(
            "--marks %s: %d applied, %d unsure and left as the audit has them, %d on trusted pairs "
            "and not needed", options.marks, certain, unsure, len(marks) - certain - unsure,
        )  # fmt: skip
    _say(done.summary, names_of(asked.data), output, export, left_out)
    if options.export not in (None, export):
        raise UsageError(
            f"--export {options.export} is not applied: {how_far(done.summary)}. {CLEANED} is that "
            "of --export keep; add --force true to apply it anyway."
        )


def _marks_of(path: str, asked: AuditOptions) -> dict[str, float | None]:
    """Read marks and refuse those of other data, before an hour of scoring."""
    marks = read_marks(path)
    loaded = load_pairs(asked.data, on_bad_row="skip", columns=asked.columns())
    unknown = marks.keys() - {uid for uid in loaded.pairs["uid"] if uid in marks}
    if unknown:
        raise UsageError(
            f"--marks {path}: {len(unknown)} of the marked pairs are not in {loaded.source}, "
            f"such as {min(unknown)}; give the marks of this audit's own report."
        )
    return marks


def audit(
    model: str | PathLike[str] | None = None,
    data: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    clean: str | PathLike[str] | int | None = None,
    *,
    judge: JudgeOptions | None = None,
    **options: Any,
) -> Audit:
    """Return how far each label of a preference set is to be believed.

    Args:
        model: a directory or hub id.
        data: what `softpref.data.sources.load_pairs` reads: a file, or a list of them.
        clean: trusted pairs, likewise, or a number of pairs to hold out.
        judge: who is asked which response is better, as a further signal; its verdicts are kept in
            the directory `output`.
        options: further fields of `AuditOptions`, such as `run` in the place of `model`.

    Raises:
        UsageError: data, model or judge cannot be used.
    """
    paths = {"model": model, "clean": clean}
    several = data if isinstance(data, list | tuple) else [] if data is None else [data]
    for name, given in (*paths.items(), *(("data", each) for each in several)):
        if not isinstance(given, str | PathLike | int | None):
            raise UsageError(
                f"{name} is a {type(given).__name__}: give where it lies, a path or hub id; "
                "a data set is written to a file by to_json('pairs.jsonl')."
            )
    if not isinstance(judge, JudgeOptions | None):
        raise UsageError(
            f"judge is a {type(judge).__name__}: give softpref.judging.options.JudgeOptions(...)."
        )
    asked: dict[str, Any] = {
        name: None if given is None else str(given) for name, given in paths.items()
    }
    asked["data"] = [str(each) for each in several]
    given_options = AuditOptions(**asked | options)
    return _audit(_asked(given_options), given_options, judge)


def _asked(options: AuditOptions) -> AuditOptions:
    """Return the options with a run's own filled in; nothing that is needed is missing."""
    asked = of_run(options) if options.run else options
    given = {name: getattr(asked, name) for name in DEFAULTS}
    asked = dataclasses.replace(
        asked, **{name: DEFAULTS[name] if value is None else value for name, value in given.items()}
    )
    for needed in ("model", "data", "clean"):
        require(getattr(asked, needed), f"--{needed}")
    refuse_unknown_choices(asked)
    refuse_too_small(asked)
    return asked


def _audit(options: AuditOptions, given: AuditOptions, judged_by: JudgeOptions | None) -> Audit:
    """Audit by complete options; `given` are the user's own, nothing of a run filled in."""
    judge = None
    if judged_by:
        require(options.output, "--output")
        directory_to_write(options.output)
        check_judge(judged_by)
        judge = make_judge(judged_by)  # what it lacks is said before an hour of scoring
    signals = _signals(options.signals)
    asked_too = _listed(options.reward_model)
    files = AlignFiles(
        str(options.model), options.data, options.clean, None, options.output, options.mix,
        **{name: getattr(options, name) for name in COLUMN_OPTIONS},
    )  # fmt: skip
    loaded, clean, _, provenance = load_sets(files, options.on_bad_row, options.seed)
    assert clean is not None
    labels = None
    if options.run:
        require_same_pairs(given, loaded, clean)
        labels = labels_of_run(options.run)
    if clean.source != options.clean:
        logger.info("clean: %s pairs held out of --data, %s; they are not audited", options.clean,
                    provenance)  # fmt: skip
    cache = ColumnCache(options.reference_cache)
    loaded, clean = with_opinions((loaded, clean), asked_too, cache)
    named_by = "--run" if options.run else "--model"
    scored = score_sets(str(options.model), loaded, clean, options, cache, named_by)
    asked_judge = None
    if judge and judged_by:
        scored, asked_judge = with_verdicts(scored, judge, judged_by, Path(options.output))
        asked_too.append(asked_judge.name)
    evidence, log_odds = evidence_of(scored.pairs, scored.clean, signals, options.seed)
    of_sources = noise_by_source(scored.pairs, -log_odds, -evidence.trusted)
    beliefs = believe(evidence, log_odds, rates_of(evidence, scored.pairs, signals))
    explained = explain(evidence, scored.pairs, signals, options.seed)
    return Audit(
        pair_rows(scored, beliefs, explained, labels),
        summarise(
            scored, beliefs, evidence.noise, of_sources, [*signals, *asked_too], provenance,
            asked_judge,
        ),
        scored.pairs.select_columns(["prompt", "chosen", "rejected"]),
        Trusted.of(scored.clean),
        loaded.fingerprint,
        scored.unused,
    )  # fmt: skip


def _signals(asked: Sequence[str] | None) -> list[SignalName]:
    """Return the signals to read, PPLDiff always among them."""
    if asked is None:
        return list(SIGNAL_NAMES)
    names = set(_listed(asked))
    unknown = names - {*SIGNAL_NAMES}
    if unknown:
        raise UsageError(
            f"--signals {min(unknown)}: choose from {' '.join(SIGNAL_NAMES)}, with spaces between."
        )
    return [name for name in SIGNAL_NAMES if name in names | {"ppl_diff"}]


def _listed(names: Sequence[str] | None) -> list[str]:
    """Return names as a list; from Python one may come alone."""
    return [names] if isinstance(names, str) else list(names or [])


def _refuse_other_contents(output: Path) -> None:
    holds = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    verdicts = {VERDICT_FILE, f"{VERDICT_FILE}.lock"}  # of an audit that was interrupted
    if holds - verdicts and SUMMARY not in holds and not is_unfinished(output):
        raise UsageError(f"--output {output}: holds something else; give a new directory.")


def _say(
    summary: Summary, sources: Sequence[str], output: Path, export: str, left_out: LeftOut
) -> None:
    for warning in summary.warnings:
        logger.warning("warning: %s", warning)
    rate = rate_text(summary.noise_rate, summary.noise_rate_low, summary.noise_rate_high)
    logger.info("evidence by %s: %s", ", ".join(summary.signals), how_far(summary))
    logger.info("wrong labels: %s", rate)
    for of in summary.sources:
        logger.info("%s", of)
    if summary.ece is not None:
        logger.info(
            "%d pairs of %s: %d suspect (more likely wrong than right), %d unsure; calibration "
            "error %.1f%%", summary.pairs, ", ".join(sources), summary.suspect, summary.unsure,
            100 * summary.ece,
        )  # fmt: skip
    if summary.auroc is not None:
        logger.info("suspicion tells right from flipped labels with AUROC %.3f", summary.auroc)
    logger.info("%s", left_out)
    logger.info("%s", EXPORTS[export])
    logger.info("written: %s, %s, %s, %s; open the last", *(output / name for name in
                (LABELS, SUMMARY, CLEANED, REPORT)))  # fmt: skip
