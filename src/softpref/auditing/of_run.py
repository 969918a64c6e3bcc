"""What an audit takes from a finished run, once it is sure that the run is whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from softpref.algorithm.methods import METHODS
from softpref.auditing.options import COLUMN_OPTIONS, DEFAULTS, OF_RUN, AuditOptions
from softpref.auditing.pair_rows import LABELS, RUN_COLUMNS
from softpref.data.sources import LoadedPairs, names_of
from softpref.errors import UsageError
from softpref.training.align import RUN_RECORD
from softpref.training.labels import read_labels
from softpref.training.seals import MANIFEST, defect


def of_run(options: AuditOptions) -> AuditOptions:
    """Return the options with what a finished run says of itself.

    Raises:
        UsageError: there is no such run, it is not as it was written, it cannot judge its labels,
            or its files are gone.
    """
    if options.model:
        raise UsageError("--model and --run: give one of them; a run has its own policy.")
    own_mix = [] if options.data else ["mix"]
    for name in (*OF_RUN, *own_mix):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name}: taken from the run; leave this option out.")
    directory = Path(str(options.run))
    if (directory / RUN_RECORD).exists() and not (directory / MANIFEST).exists():
        raise UsageError(
            f"--run {options.run}: has no {MANIFEST}: it was removed, or the run is of a softpref "
            "that wrote none. Audit by --model, --data and --clean."
        )
    if reason := defect(directory):
        raise UsageError(
            f"--run {options.run}: not a finished run: {reason}. Give the --output of softpref "
            "train as it was written; without it, audit by --model, --data and --clean."
        )
    try:
        record = _record(directory)
        method, files, said = record["method"], record["files"], record["options"]
        own = {name: said[name] for name in DEFAULTS}
        given = {"data": files["train"], "clean": files["clean"]}
        own |= {name: files[name] for name in COLUMN_OPTIONS}
        own |= {name: files.get(name) for name in own_mix}
        needed = [(name, file) for name in given for file in names_of(given[name] or [])]
        doubts = METHODS[method].doubts and record.get("evidence_speaks") is not False
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"--run {options.run}: not a finished run ({RUN_RECORD}: {error}); give the --output "
            "of softpref train."
        ) from None
    if not doubts:
        raise UsageError(
            f"--run {options.run} was trained by {method}, which takes labels at their word, so "
            "its policy repeats them: audit by the model it started from, --model "
            f"{files['model']}."
        )
    asked = {name: getattr(options, name) for name in ("data", "clean", "on_bad_row")}
    for name, file in needed:
        if not asked[name] and Path(file).is_absolute() and not Path(file).exists():
            raise UsageError(f"--run {options.run}: its file {file} is not there; give --{name}.")
    asked = {name: value for name, value in asked.items() if value}
    return dataclasses.replace(options, **{"model": options.run, **own, **given, **asked})


def require_same_pairs(given: AuditOptions, loaded: LoadedPairs, clean: LoadedPairs) -> None:
    """Refuse files of a run that have changed since; files that the user gave may be others.

    Args:
        given: the user's own options, nothing of the run filled in.
        loaded: the pairs to audit.
        clean: the trusted pairs.

    Raises:
        UsageError: one has.
    """
    record = _record(Path(str(given.run)))
    held_out = any(str(n).isdigit() for n in (given.clean, record["files"]["clean"]))
    if held_out and (given.data or given.clean):  # other pairs are held out, so others remain
        return
    for option, now, then in (("data", loaded, "train"), ("clean", clean, "clean")):
        if not getattr(given, option) and now.fingerprint != record["data"][then]["fingerprint"]:
            raise UsageError(
                f"--run {given.run}: {now.source} has changed since the run read it: restore it, "
                f"or give --{option} to audit by the pairs that it holds now."
            )


def labels_of_run(run: str) -> pa.Table | None:
    """Return the labels that a finished run left, None where it was told to label no pairs.

    Raises:
        UsageError: they cannot be read.
    """
    if not _record(Path(run))["options"].get("label_pairs", True):
        return None
    path = Path(run) / LABELS
    try:
        return read_labels(path).select(["uid", *RUN_COLUMNS])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"--run {run}: its {path} cannot be read ({error}); train again, or audit by --model, "
            "--data and --clean."
        ) from None


def _record(run: Path) -> Any:
    return json.loads((run / RUN_RECORD).read_text(encoding="utf-8"))
