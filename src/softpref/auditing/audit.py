"""`softpref audit`: estimate how reliable each label of a preference set is."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.arguments import named_as_arguments
from softpref.auditing.beliefs import pair_beliefs
from softpref.auditing.data_card import data_card
from softpref.auditing.dry_run import log_cost
from softpref.auditing.explanations import explain_pairs
from softpref.auditing.export import CLEANED, EXPORTS, DroppedRows, TrustedLabels, write_cleaned
from softpref.auditing.finished_run import labels_as_trained, options_of_run, require_same_pairs
from softpref.auditing.marks import read_marks
from softpref.auditing.opinions import VERDICT_FILE, with_opinions, with_verdicts
from softpref.auditing.options import DEFAULTS, AuditOptions, refuse_unread_in_python
from softpref.auditing.pair_rows import LABELS, label_key, pair_rows
from softpref.auditing.report import REPORT, write_report
from softpref.auditing.result import Audit
from softpref.auditing.review_tools import REVIEW_FILES, write_for_review
from softpref.auditing.scores import score_sets
from softpref.auditing.summary import Summary, annotator_lines, evidence_skill, summarise
from softpref.data.column_cache import ColumnCache
from softpref.data.given import Given, sources_of
from softpref.data.readers import dataset_rows
from softpref.data.sources import load_pairs, names_of
from softpref.data.splits import places_of_ties, without_ties
from softpref.errors import UsageError
from softpref.hub import CARD
from softpref.judging.ask import make_judge
from softpref.judging.journal import journal_path
from softpref.judging.options import JudgeOptions, check_judge
from softpref.judging.questions import Judge
from softpref.judging.shared import asking, follow
from softpref.models.loading import loaded_from
from softpref.models.quantized import require_name
from softpref.options import (
    did_you_mean,
    refuse_impossible_seeds,
    refuse_too_small,
    refuse_unknown_choices,
    require,
)
from softpref.places import directory_to_write
from softpref.statistics.noise_rate import rate_text
from softpref.training.annotators import annotators_of
from softpref.training.evidence import SIGNAL_NAMES, SignalName, evidence_of, rates_of
from softpref.training.needs import noise_by_source
from softpref.training.output import (
    appearing_together,
    first_writes,
    is_unfinished,
    write_lines,
    write_text,
)
from softpref.training.seals import write_manifest
from softpref.training.sets import Sets, held_out_count, read_sets

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"


def run_audit(
    options: AuditOptions, judge: JudgeOptions | None = None, ranks: Ranks = ALONE
) -> None:
    """Audit a set and write `labels.jsonl`, `summary.json`, `report.html` and `cleaned.jsonl`.

    Also a data card, `manifest.json`, which seals the rest, and files for `export_to`. Several
    processes share the scoring; the first asks the judge and writes.

    Raises:
        UsageError: an option is wrong or missing, or data, model or judge cannot be used. Only
            verdicts that the judge has already given are written then. It is also raised after
            the audit is written, if `export` needs evidence that the data do not give.
    """
    require(options)
    if options.dry_run:
        if ranks.count > 1:
            raise UsageError("--dry_run: one process is enough; start it without torchrun.")
        complete = _complete(options)
        log_cost(_audited(_read(complete)), complete, judge)
        return
    _write_audit(options, judge, ranks=ranks)


def _write_audit(
    options: AuditOptions,
    judge: JudgeOptions | None,
    processing_class: PreTrainedTokenizerBase | None = None,
    ranks: Ranks = ALONE,
) -> Audit | None:
    """Audit and write; None for all processes but the first."""
    output = directory_to_write(options.output)
    _refuse_other_contents(output)
    complete = _complete(options)
    marks = _read_marks(options.marks, complete) if options.marks else {}
    with first_writes(output, ranks.rank):
        result = _audit(complete, options, judge, processing_class, ranks)
        if result is None:
            return None
        pairs, summary, fingerprint = result.pairs, result.summary, result.fingerprint
        applies = summary.evidence_speaks or options.force
        export = (options.export or "soft") if applies else "keep"
        trusted, columns, unused = result.trusted, complete.columns(), result.unused
        ties = result.ties
        with appearing_together(output, SUMMARY) as home:
            write_lines(home / LABELS, dataset_rows(pairs))
            write_text(home / SUMMARY, json.dumps(summary.record(), indent=1) + "\n")
            about = _about(complete, summary)
            report = home / REPORT
            write_report(report, pairs, result.texts, summary, about, fingerprint, complete.seed)
            dropped = write_cleaned(
                complete.data, home, pairs, trusted, export, marks, columns, unused, ties
            )
            if tool := complete.export_to:
                write_for_review(home, tool, pairs, result.texts, summary, fingerprint)
            write_manifest(home, {file.name: file for file in home.iterdir()})
            model = _model_name(complete.model)
            files = names_of(complete.data, "data"), _clean_name(complete), model
            write_text(home / CARD, data_card(summary, *files, export, dropped))
            for name in {*chain(*REVIEW_FILES.values())} - {file.name for file in home.iterdir()}:
                (output / name).unlink(missing_ok=True)  # of an earlier audit
    if options.marks:
        applied = sum(marks.get(uid) is not None for uid in pairs["uid"])
        unsure = sum(mark is None for mark in marks.values())
        logger.info(
            f"marks of {options.marks}: {applied} applied, {unsure} unsure and left to the audit, "
            f"{len(marks) - applied - unsure} on trusted pairs and not needed"
        )
    _log_summary(summary, names_of(complete.data, "data"), output, export, dropped)
    if complete.export_to:
        written = " and ".join(str(output / name) for name in REVIEW_FILES[complete.export_to])
        logger.info(f"for review in {complete.export_to}: {written}; give its export to --marks")
    if options.export not in (None, export):
        raise UsageError(
            f"--export {options.export} is not applied: {evidence_skill(summary)}. {CLEANED} is "
            "written as by --export keep; add --force true to apply it anyway."
        )
    return dataclasses.replace(result, report=output / REPORT)


def _read_marks(path: str, options: AuditOptions) -> dict[str, float | None]:
    """Read marks and refuse those of other data before the pairs are scored."""
    loaded = load_pairs(options.data, on_bad_row="skip", columns=options.columns())
    labels = {row["uid"]: label_key(row) for row in dataset_rows(loaded.pairs)}
    marks = read_marks(path, labels)
    unknown = marks.keys() - labels.keys()
    if unknown:
        raise UsageError(
            f"--marks {path}: {len(unknown)} of the marked pairs are not in {loaded.source}, "
            f"such as {min(unknown)}; give the marks of this audit's own report."
        )
    return marks


@named_as_arguments(AuditOptions, JudgeOptions)
def audit(
    model: str | PathLike[str] | nn.Module | None = None,
    data: Given | None = None,
    clean: Given | int | None = None,
    *,
    judge: JudgeOptions | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Audit:
    """Return how reliable each label of a preference set is.

    With `output`, a directory, it is also written as `softpref audit` writes it.

    Args:
        model: a directory or hub id, or a causal language model of transformers, plain or PEFT.
        data: a Dataset, a list of rows, a DataFrame, a path or hub id, or a list of paths.
        clean: trusted pairs, given likewise, or a number of pairs to hold out.
        judge: a judge whose verdicts on the pairs are a further signal; they are stored in the
            directory `output`.
        processing_class: the tokenizer; by default the model's own.
        options: further fields of `AuditOptions`, such as `run` instead of `model`.

    Raises:
        UsageError: data, model or judge cannot be used.
    """
    if not isinstance(judge, JudgeOptions | None):
        raise UsageError(
            f"judge is a {type(judge).__name__}: give softpref.judging.options.JudgeOptions(...)."
        )
    if not isinstance(model, str | PathLike | nn.Module | None):
        kind = type(model).__name__
        raise UsageError(f"model is a {kind}: give a path or hub id, or a model of transformers.")
    known = [field.name for field in dataclasses.fields(AuditOptions)]
    for name in sorted(options.keys() - set(known)):
        raise UsageError(f"{name}: audit has no such argument{did_you_mean(name, known)}.")
    named = {"model": model, "data": data, "clean": clean, **options}
    given = AuditOptions(**{name: _in_options(name, value) for name, value in named.items()})
    refuse_unread_in_python(given)
    if given.output:
        return cast(Audit, _write_audit(given, judge, processing_class))
    return cast(Audit, _audit(_complete(given), given, judge, processing_class))


def _in_options(name: str, value: Any) -> Any:
    """Return an argument as options hold it: paths as text, and pairs in memory as sources."""
    if name not in ("data", "clean") or value is None:
        return str(value) if isinstance(value, PathLike) else value
    if isinstance(value, str | PathLike) or type(value) is int:
        return str(value)
    sources = sources_of(value, name)
    is_in_memory = [each.name for each in sources] == [name]
    return sources if is_in_memory else [each.name for each in sources]


def _complete(options: AuditOptions) -> AuditOptions:
    """Return the options with those of a run and defaults filled in."""
    complete = options_of_run(options) if options.run else options
    unset = {name: value for name, value in DEFAULTS.items() if getattr(complete, name) is None}
    complete = dataclasses.replace(complete, **unset)
    require(complete, "model", "data", "clean")
    refuse_unknown_choices(complete)
    refuse_too_small(complete)
    refuse_impossible_seeds(complete)
    return complete


def _judge_of(
    options: AuditOptions, judge_options: JudgeOptions | None, ranks: Ranks, cache: ColumnCache
) -> Judge | None:
    """Return the judge that was asked for, if any, loaded."""
    if not judge_options:
        return None
    require(options, "output")
    directory_to_write(options.output)
    check_judge(judge_options)
    return make_judge(judge_options, ranks, cache)


def _audit(
    options: AuditOptions,
    given: AuditOptions,
    judge_options: JudgeOptions | None,
    processing_class: PreTrainedTokenizerBase | None,
    ranks: Ranks = ALONE,
) -> Audit | None:
    """Audit by complete options; `given` are the user's own, without those of a run.

    None for all processes but the first, which score along.
    """
    cache = ColumnCache(options.reference_cache)
    judge = _judge_of(options, judge_options, ranks, cache)  # fails before the pairs are scored
    require_name(cast("nn.Module | str", options.model), options.bits())
    signals = _signals(options.signals)
    opinions = _as_list(options.reward_model)
    sets = _read(options)
    ties, sets = places_of_ties(sets.train), _audited(sets)
    loaded, clean, provenance = sets.train, sets.clean, sets.provenance
    assert clean is not None
    labels = None
    if options.run:
        require_same_pairs(given, loaded, clean)
        labels = labels_as_trained(given, loaded)
    if sets.is_held_out:
        logger.info(f"clean: {options.clean} pairs held out of the data, not audited: {provenance}")
    bits = given.bits()  # a run's own are those of its base
    dtype = torch.bfloat16 if options.bf16 else None
    loaded, clean = with_opinions((loaded, clean), opinions, cache, ranks, bits, dtype)
    model_option = "--run" if options.run else "--model"
    model = cast("nn.Module | str", options.model)
    scored = score_sets(model, loaded, clean, options, cache, model_option, processing_class, ranks)
    if not ranks.is_first:
        if judge:
            follow([judge], ranks)
        return None
    judged = None
    if judge and judge_options:
        with asking([judge], ranks) as (judge,):
            scored, judged = with_verdicts(scored, judge, judge_options, Path(options.output))
        opinions.append(judged.name)
    evidence, log_odds = evidence_of(scored.pairs, scored.clean, signals, options.seed)
    rates = rates_of(evidence, scored.pairs, signals)
    noise = evidence.noise, noise_by_source(scored.pairs, -log_odds, -evidence.trusted, rates)
    beliefs = pair_beliefs(evidence, log_odds, rates)
    said = log_odds * evidence.speaks, evidence.trusted * evidence.speaks
    annotators = annotators_of(loaded.pairs, scored.pairs, scored.clean, *said)
    explanations = explain_pairs(evidence, scored.pairs, signals, options.seed)
    named, count = [*signals, *opinions], len(ties)
    summary = summarise(scored, beliefs, *noise, named, provenance, judged, annotators, ties=count)
    return Audit(
        pair_rows(scored, beliefs, explanations, labels),
        summary,
        scored.pairs.select_columns(["prompt", "chosen", "rejected"]),
        TrustedLabels.of(scored.clean),
        loaded.fingerprint,
        scored.unused,
        ties,
    )


def _read(options: AuditOptions) -> Sets:
    """Return the pairs to audit and the trusted pairs."""
    data, clean, columns = options.data, options.clean, options.columns()
    names = {"train": "data"}
    return read_sets(
        data, clean, None, options.on_bad_row, options.seed, options.mix, columns, names
    )


def _audited(sets: Sets) -> Sets:
    audited = without_ties(sets.train, "which have no label to be wrong: not audited")
    return dataclasses.replace(sets, train=audited)


def _signals(given: Sequence[str] | None) -> list[SignalName]:
    """Return the signals to read; PPLDiff is always one of them."""
    if given is None:
        return list(SIGNAL_NAMES)
    names = set(_as_list(given))
    unknown = names - {*SIGNAL_NAMES}
    if unknown:
        raise UsageError(
            f"--signals {min(unknown)}: choose from {' '.join(SIGNAL_NAMES)}, separated by spaces."
        )
    return [name for name in SIGNAL_NAMES if name in names | {"ppl_diff"}]


def _as_list(names: Sequence[str] | None) -> list[str]:
    """Return names as a list; in Python a single name may be a string."""
    return [names] if isinstance(names, str) else list(names or [])


def _refuse_other_contents(output: Path) -> None:
    names = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    logs = (VERDICT_FILE, journal_path(Path(VERDICT_FILE)).name)  # of an interrupted audit
    known = {*logs, *(f"{log}.lock" for log in logs)}
    if names - known and SUMMARY not in names and not is_unfinished(output):
        raise UsageError(f"--output {output}: holds something else; give a new directory.")
    if SUMMARY in names:
        logger.info("%s: holds an earlier audit, which this one will replace", output)


def _about(options: AuditOptions, summary: Summary) -> dict[str, str]:
    """Return what the report's first lines name."""
    clean = _clean_name(options)
    if held_out_count(clean) is not None:
        clean = f"held out of the data, {summary.clean_provenance}"
    return {
        "Data": ", ".join(names_of(options.data, "data")),
        "Run" if options.run else "Model": options.run or _model_name(options.model),
        "Clean set": f"{summary.clean_pairs} pairs, {clean}",
        "Date": date.today().isoformat(),
        "softpref": version("softpref"),
    }


def _clean_name(options: AuditOptions) -> str:
    """Return what `clean` names, or its number of pairs to hold out."""
    return ", ".join(names_of(options.clean, "clean"))


def _model_name(model: Any) -> str:
    return str(model) if isinstance(model, str) else loaded_from(model) or type(model).__name__


def _log_summary(
    summary: Summary, sources: Sequence[str], output: Path, export: str, dropped: DroppedRows
) -> None:
    for warning in summary.warnings:
        logger.warning("warning: %s", warning)
    rate = rate_text(summary.noise_rate, summary.noise_rate_low, summary.noise_rate_high)
    logger.info("evidence by %s: %s", ", ".join(summary.signals), evidence_skill(summary))
    logger.info("wrong labels: %s", rate)
    for line in (*summary.sources, *annotator_lines(summary)):
        logger.info("%s", line)
    if summary.ece is not None:
        suspect = f"{summary.suspect} suspect (more likely wrong than right)"
        calibration = f"calibration error {summary.ece:.1%}"
        names = ", ".join(sources)
        logger.info(
            f"{summary.pairs} pairs of {names}: {suspect}, {summary.unsure} unsure; {calibration}"
        )
    if summary.auroc is not None:
        logger.info(f"ranks separate right from flipped labels with AUROC {summary.auroc:.3f}")
    logger.info("%s", dropped)
    logger.info("%s", EXPORTS[export])
    written = ", ".join(str(output / name) for name in (LABELS, SUMMARY, CLEANED, REPORT))
    logger.info(f"written: {written}; open the last")
