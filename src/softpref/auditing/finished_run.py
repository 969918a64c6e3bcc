"""Options, fingerprints and labels that an audit reads from a finished run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from softpref import quantization
from softpref.algorithm.methods import METHODS
from softpref.auditing.options import COLUMN_OPTIONS, DEFAULTS, RUN_DEFAULTS, AuditOptions
from softpref.auditing.pair_rows import LABELS, RUN_COLUMNS, label_key
from softpref.data.readers import dataset_rows
from softpref.data.sources import LoadedPairs, contents, names_of
from softpref.errors import UsageError
from softpref.models.quantized import RUN_RECORD
from softpref.training.finished import read_record
from softpref.training.labels import read_labels
from softpref.training.seals import MANIFEST, defect
from softpref.training.sets import held_out_count, read_sets

logger = logging.getLogger(__name__)


def options_of_run(options: AuditOptions) -> AuditOptions:
    """Return the options with model, data and settings of a finished run filled in.

    Raises:
        UsageError: there is no such run, it was changed since it was written, its method believes
            every label, or its files are missing.
    """
    if options.model:
        raise UsageError("--model and --run: give one of them; a run has its own policy.")
    own_mix = [] if options.data else ["mix"]
    for name in (*RUN_DEFAULTS, *quantization.LOAD_IN, *own_mix):
        value = getattr(options, name)
        if value is not None and value is not False:
            raise UsageError(f"--{name} comes from the run: omit this option.")
    directory = Path(str(options.run))
    if (directory / RUN_RECORD).exists() and not (directory / MANIFEST).exists():
        raise UsageError(
            f"--run {options.run}: has no {MANIFEST}: it was removed, or an older softpref made "
            "the run. Audit with --model, --data and --clean."
        )
    if reason := defect(directory):
        raise UsageError(
            f"--run {options.run}: not a finished run: {reason}. Give the unchanged --output of "
            "softpref train, or audit with --model, --data and --clean."
        )
    try:
        record = read_record(directory)
        method, files, settings = record["method"], record["files"], record["options"]
        recorded = {"model": options.run, "data": files["train"], "clean": files["clean"]}
        needed = [(k, file) for k in ("data", "clean") for file in names_of(recorded[k] or [])]
        recorded |= {name: settings[name] for name in DEFAULTS}
        recorded |= {name: files[name] for name in COLUMN_OPTIONS}
        recorded |= {name: files.get(name) for name in own_mix}
        bits = record.get("quantization") or {}
        recorded |= {name: bool(bits.get(name)) for name in quantization.LOAD_IN}
        doubts = METHODS[method].doubts and record.get("evidence_speaks") is not False
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"--run {options.run}: not a finished run ({RUN_RECORD}: {error}); give the --output "
            "of softpref train."
        ) from None
    _refuse_unfit(str(options.run), record, doubts)
    given = {name: getattr(options, name) for name in ("data", "clean", "on_bad_row")}
    for name in ("data", "clean"):
        if not given[name] and not recorded[name]:
            raise UsageError(
                f"--run {options.run}: names no file of its pairs, which were objects in memory or "
                f"not given: give --{name}."
            )
    for name, file in needed:
        if not given[name] and Path(file).is_absolute() and not Path(file).exists():
            raise UsageError(f"--run {options.run}: its file {file} does not exist: give --{name}.")
    given = {name: value for name, value in given.items() if value}
    return dataclasses.replace(options, **recorded | given)


def _refuse_unfit(run: str, record: dict[str, Any], doubts: bool) -> None:
    """Refuse what is no longer a run, and a run that believed every label."""
    if "merged" in record:
        raise UsageError(
            f"--run {run}: is a merged model: give the run that it was made from, "
            f"--run {record['merged']['run']}."
        )
    if not doubts:
        raise UsageError(
            f"--run {run} was trained by {record['method']}, which believes every label, so its "
            "policy repeats them: audit with the model that it started from, --model "
            f"{record['files']['model']}."
        )


def require_same_pairs(given: AuditOptions, loaded: LoadedPairs, clean: LoadedPairs) -> None:
    """Refuse files that have changed since the run; files that the user gives may differ.

    Args:
        given: the user's own options, without those of the run.
        loaded: the pairs to audit.
        clean: the trusted pairs.

    Raises:
        UsageError: a file has changed.
    """
    record = read_record(Path(str(given.run)))
    held_out = any(held_out_count(of) is not None for of in (given.clean, record["files"]["clean"]))
    if held_out and (given.data or given.clean):  # the split differs from the run's
        return
    for option, now, then in (("data", loaded, "train"), ("clean", clean, "clean")):
        if not getattr(given, option) and now.fingerprint != record["data"][then]["fingerprint"]:
            raise UsageError(
                f"--run {given.run}: {now.source} has changed since the run read it: restore it, "
                f"or give --{option} to audit with its present pairs."
            )


def labels_as_trained(given: AuditOptions, loaded: LoadedPairs) -> pa.Table | None:
    """Return the labels that a run left of those pairs that are labelled as the run had them.

    A pair's uid is the same whichever response is chosen, so a corrected pair has that of the label
    it had.

    Args:
        given: the user's own options, without those of the run.
        loaded: the pairs to audit.

    Raises:
        UsageError: the labels cannot be read.
    """
    labels, record = labels_of_run(str(given.run)), read_record(Path(str(given.run)))
    then = record["data"]["train"]["fingerprint"]
    if labels is None or loaded.fingerprint == then:
        return labels
    clean = None if record["files"]["clean"] else given.clean
    try:
        own = options_of_run(AuditOptions(run=given.run, clean=clean))
        bad_rows, seed, columns = own.on_bad_row, own.seed, own.columns()
        trained = read_sets(own.data, own.clean, None, bad_rows, seed, own.mix, columns).train
    except UsageError as error:
        logger.warning(f"--run {given.run}: its own pairs, to compare labels, are missing: {error}")
        return labels[:0]
    if trained.fingerprint != then:
        changed = f"{trained.source}, whose labels it would take, has changed since"
        logger.warning(f"--run {given.run}: {changed}")
        return labels[:0]
    as_now = set(_labelled(loaded.pairs))
    alike = [uid for uid, label in _labelled(trained.pairs) if (uid, label) in as_now]
    return labels.filter(pc.is_in(labels["uid"], value_set=pa.array(alike, pa.string())))


def _labelled(pairs: Dataset) -> Iterator[tuple[str, str]]:
    """Return each uid with its `label_key`."""
    rows = zip(pairs["uid"], dataset_rows(contents(pairs)), strict=True)
    return ((uid, label_key(row)) for uid, row in rows)


def labels_of_run(run: str) -> pa.Table | None:
    """Return the labels that a finished run left, None where it was told to label no pairs.

    Raises:
        UsageError: they cannot be read.
    """
    if read_record(Path(run))["options"].get("label_pairs") is False:
        return None
    path = Path(run) / LABELS
    try:
        return read_labels(path).select(["uid", *RUN_COLUMNS])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"--run {run}: its {path} cannot be read ({error}); train again, or audit with "
            "--model, --data and --clean."
        ) from None
