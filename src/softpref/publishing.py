"""`softpref push`: a finished run or audit to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softpref.auditing.audit import SUMMARY
from softpref.auditing.export import CLEANED
from softpref.auditing.pair_rows import LABELS
from softpref.errors import UsageError
from softpref.hub import CARD, create_repository
from softpref.models.quantized import RUN_RECORD
from softpref.options import option
from softpref.training.publishing import sealed_files, upload_sealed

OF_AUDIT = (CARD, CLEANED, LABELS, SUMMARY)
"""What is uploaded of an audit; the report shows rows that the cleaned set drops."""


@dataclass
class PushOptions:
    """Options of `softpref push`."""

    private: bool = option(
        "Create a private repository. The token comes from HF_TOKEN, or from `hf auth login`.",
        False,
    )


def run_push(named: Sequence[str], options: PushOptions) -> None:
    """Upload a run to a model repository, or an audit's cleaned set to a data set repository.

    Args:
        named: the directory of the run or audit, and the repository, which is created if need be.
        options: the options.

    Raises:
        UsageError: the directory holds neither, is not finished or was changed, or the hub refuses;
            nothing was uploaded.
    """
    if len(named) != 2:
        raise UsageError(
            "give a directory and a repository, before any option: softpref push RUN|AUDIT "
            "ORGANIZATION/NAME --private."
        )
    directory, repo = Path(named[0]), named[1]
    if (directory / RUN_RECORD).is_file():
        files = sealed_files(directory)
        name = create_repository(repo, "model", options.private or None)
        upload_sealed(files, name, "model")
    elif (directory / SUMMARY).is_file():
        files = {name: path for name, path in sealed_files(directory).items() if name in OF_AUDIT}
        name = create_repository(repo, "dataset", options.private or None)
        upload_sealed(files, name, "dataset")
    else:
        raise UsageError(
            f"{directory}: holds neither a finished run ({RUN_RECORD}) nor an audit ({SUMMARY}); "
            "give the --output of a finished softpref train or audit."
        )
