"""Sealed files of a finished run or audit, and how they go to the hub."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import TrainingArguments

from softpref.errors import UsageError
from softpref.hub import CARD, RepoKind, upload, without_secrets
from softpref.models.quantized import RUN_RECORD
from softpref.training.seals import MANIFEST, defect, write_manifest

RECORDS = {RUN_RECORD, "summary.json", "training_args.json"}
"""Files that hold a user's options or the names of files and judges."""

logger = logging.getLogger(__name__)


def sealed_files(directory: Path) -> dict[str, Path]:
    """Return the files of a finished run or audit, by name, and its card, which may be edited.

    Raises:
        UsageError: it is not finished, or was changed after it was written.
    """
    if reason := defect(directory):
        raise UsageError(
            f"{directory}: not complete: {reason}. Give the unchanged --output of a finished "
            "softpref train or audit."
        )
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    card = [CARD] if (directory / CARD).is_file() else []
    return {name: directory / name for name in (*card, *sorted(manifest["files"]))}


def upload_sealed(
    files: Mapping[str, Path],
    repo: str,
    kind: RepoKind,
    *,
    token: str | None = None,
    revision: str | None = None,
) -> None:
    """Upload files with a manifest of their own to an existing repository.

    Secrets in records of options are not uploaded; the log names their keys.

    Args:
        files: some of `sealed_files`.
        repo: the repository.
        kind: of the repository.
        token: to upload with, instead of HF_TOKEN or the hub's login.
        revision: the branch to upload to.

    Raises:
        UsageError: the hub refuses, or cannot be reached.
    """
    files = dict(files)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        for name in RECORDS & files.keys():
            text, secrets = without_secrets(files[name])
            if secrets:
                logger.warning(
                    f"warning: {name}: the values of {', '.join(secrets)} look like secrets and "
                    "are not uploaded"
                )
                files[name] = home / name
                files[name].write_text(text, encoding="utf-8")
        write_manifest(home, {name: path for name, path in files.items() if name != CARD})
        upload(repo, kind, files | {MANIFEST: home / MANIFEST}, token=token, revision=revision)


def push_run(output: Path, repo: str, args: TrainingArguments) -> None:
    """Upload a finished run to an existing repository.

    Raises:
        UsageError: the hub refuses, or cannot be reached; the run is complete all the same.
    """
    try:
        files, token, revision = sealed_files(output), args.hub_token, args.hub_revision
        upload_sealed(files, repo, "model", token=token, revision=revision)
    except UsageError as error:
        raise UsageError(f"{error} The run is complete: softpref push {output} {repo}.") from error
