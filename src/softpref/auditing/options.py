"""Options of `softpref audit`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from softpref.columns import ColumnOptions, Columns
from softpref.data.column_cache import REFERENCE_CACHE
from softpref.data.mixing import MIX
from softpref.errors import UsageError
from softpref.options import option
from softpref.quantization import QuantizationOptions

RUN_DEFAULTS: dict[str, Any] = {"max_length": 1024, "ppl_scope": "response", "seed": 42}
"""Options that come from a run, with their defaults without one."""
DEFAULTS: dict[str, Any] = RUN_DEFAULTS | {"on_bad_row": "stop"}
COLUMN_OPTIONS = [field.name for field in dataclasses.fields(ColumnOptions)]


@dataclass
class AuditOptions(ColumnOptions, QuantizationOptions):
    """Options of `softpref audit`."""

    GROUP: ClassVar[str] = "data"

    model: str | None = option(
        "The model that scores the pairs: a directory or hub id.",
        required=True,
        unless="run",
        metavar="DIR|ID",
    )
    data: list[str] | str = option(
        "Pairs to audit: JSONL, JSON, Parquet, CSV or hub id; several files are one set.",
        "",
        required=True,
        unless="run",
        metavar="FILE",
    )
    clean: str | None = option(
        "Trusted pairs: a file, or a number of pairs to hold out.",
        required=True,
        unless="run",
        metavar="FILE|N",
    )
    run: str | None = option(
        "A finished run of mspo, mspo_static, evidence or re_po, instead of --model: its labels "
        "and its policy; --data and --clean default to those of the run.",
        metavar="DIR",
    )
    output: str = option(
        "Directory for the audit; an earlier audit in it is replaced.",
        "",
        required=True,
        unless="dry_run",
        metavar="DIR",
    )
    signals: list[str] | None = option(
        "Signals to read from each pair in one pass: ppl_diff (always), length, content (what the "
        "responses say); default: all.",
        group="method",
        metavar="NAME",
    )
    reward_model: list[str] | None = option(
        "Reward models whose opinions are further signals: sequence classifiers with one output, "
        "directories or hub ids. Each scores every response once; loaded as --bf16 and "
        "--load_in_4bit say.",
        group="method",
        metavar="DIR|ID",
    )
    export: Literal["keep", "soft", "drop", "flip"] | None = option(
        "How cleaned.jsonl treats suspects: `soft` adds each label's probability as `soft_label`, "
        "`keep` marks them, `drop` removes them, `flip` swaps the responses; default soft, or keep "
        "if no signal distinguishes right labels from wrong ones.",
        group="output",
    )
    force: bool = option(
        "Apply --export even if no signal distinguishes right labels from wrong ones.",
        False,
        group="output",
    )
    export_to: Literal["argilla", "label_studio"] | None = option(
        "Also write the pairs as files that a review tool imports: argilla or label_studio.",
        group="output",
    )
    marks: str | None = option(
        "Reviewer marks to apply to cleaned.jsonl: marks.jsonl of report.html, or the JSON export "
        "of Argilla or Label Studio.",
        group="output",
        metavar="FILE",
    )
    max_length: int = option("Maximum tokens in prompt plus response; default 1024.", least=2)
    batch_size: int = option("Pairs in one forward pass.", 8, least=1, group="hardware")
    ppl_scope: Literal["response", "sequence", "sequence_per_response_token"] = option(
        "Which tokens count in PPLDiff; default `response`.", group="method"
    )
    bf16: bool = option("Score in bfloat16.", False, group="hardware")
    seed: int = option("Seed for the pairs that --clean N holds out; default 42.", group="other")
    on_bad_row: Literal["stop", "skip"] = option(
        "Stop at a bad row, or skip it; default `stop`, or the run's choice."
    )
    trust_remote_code: bool = option("Run code that comes with the model.", False, group="other")
    mix: list[float] | None = option(MIX, metavar="SHARE")
    dry_run: bool = option(
        "Read the data, load the model, log the time the audit would take, and stop.",
        False,
        group="output",
    )
    reference_cache: str | None = option(REFERENCE_CACHE, metavar="DIR", group="other")

    def columns(self) -> Columns:
        """Return the column names; the pairs of a run are read as the run read them."""
        columns = super().columns()
        return columns.of_training() if self.run else columns


def refuse_unread_in_python(options: AuditOptions) -> None:
    """Refuse what `softpref.audit` would not read.

    Raises:
        UsageError: it is a dry run, or an option about files and there is no `output`.
    """
    if options.dry_run:
        raise UsageError("--dry_run is for the command softpref audit: omit it in Python.")
    for name in ("marks", "export", "force", "export_to"):
        if getattr(options, name) and not options.output:
            raise UsageError(f"--{name} is about files that are written: give --output, too.")
