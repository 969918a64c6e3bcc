"""`softpref inject`: flip labels, at random or of hard pairs more often, and keep the truth."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from softpref.columns import ColumnOptions
from softpref.data.noise import Injected, inject, require_new_file, require_rate
from softpref.errors import UsageError
from softpref.options import option, refuse_unread, require

logger = logging.getLogger(__name__)


@dataclass
class InjectOptions(ColumnOptions):
    """Options of `softpref inject`."""

    input: str = option(
        "Pairs: JSONL, JSON, Parquet, CSV or hub id.", "", required=True, metavar="FILE"
    )
    output: str = option("New file; its ending says the format.", "", required=True, metavar="FILE")
    kind: Literal["random", "difficulty"] = option(
        "`random`: every label with one probability; `difficulty`: hard pairs more often, those "
        "whose responses a surrogate model finds nearly as likely as each other.",
        "random",
        group="method",
    )
    rate: float | None = option(
        "Of random: probability of a flip, at least 0 and below 1.",
        read_by=("random",),
        group="method",
    )
    seed: int = option("Seed of the draws.", 0)
    model: str | None = option(
        "Of difficulty: the surrogate, a directory or hub id.",
        read_by=("difficulty",),
        group="method",
        metavar="DIR|ID",
    )
    hard_rate: float | None = option(
        "Of difficulty: flips of the harder half; default 0.4.",
        read_by=("difficulty",),
        group="method",
    )
    easy_rate: float | None = option(
        "Of difficulty: flips of the other half; default 0.1.",
        read_by=("difficulty",),
        group="method",
    )
    max_length: int | None = option(
        "Of difficulty: maximum tokens in prompt plus response; default 1024.",
        read_by=("difficulty",),
        least=2,
        group="data",
    )
    trust_remote_code: bool = option(
        "Of difficulty: run code that comes with the model.", False, read_by=("difficulty",)
    )


def run_inject(options: InjectOptions) -> None:
    """Flip labels as the options say, and print how many.

    Raises:
        UsageError: an option is wrong or missing, or input, model or output cannot be used.
    """
    _check(options)
    require_new_file(options.input, options.output)  # before a surrogate reads for an hour
    if options.kind == "difficulty":
        done, drawn = _by_difficulty(options)
    else:
        done = inject(
            options.input, options.output, options.rate or 0.0, options.seed, options.columns()
        )
        drawn = f"rate {done.rate:.1%}"
    logger.info(
        "%s",
        f"{done.output}: {done.flipped} of {done.pairs} labels flipped ({done.realised_rate:.1%}; "
        f"{drawn}, seed {options.seed}); the truth is in is_flipped",
    )


def _by_difficulty(options: InjectOptions) -> tuple[Injected, str]:
    """Flip hard pairs more often than easy ones; also return a sentence with the counts."""
    from softpref.models.difficulty import inject_by_difficulty  # takes seconds: torch and more

    given = {name: getattr(options, name) for name in ("hard_rate", "easy_rate", "max_length")}
    found = inject_by_difficulty(
        options.input,
        options.output,
        str(options.model),
        options.seed,
        trust_remote_code=options.trust_remote_code,
        columns=options.columns(),
        **{name: value for name, value in given.items() if value is not None},
    )
    drawn = "; ".join(
        f"{done.flipped} of {done.pairs} {name} pairs, {done.realised_rate:.1%}, at rate "
        f"{done.rate:.1%}"
        for name, done in (("hard", found.hard), ("easy", found.easy))
    )
    return found.every, f"{drawn}; hard is an absolute log-ratio below {found.median:.2f} nats"


def _check(options: InjectOptions) -> None:
    require(options)
    refuse_unread(options, "kind")
    if options.kind == "random" and options.rate is None:
        raise UsageError("--rate is missing: give a share of pairs in [0, 1), such as 0.4.")
    if options.kind == "difficulty" and not options.model:
        raise UsageError(
            "--model is missing: give the surrogate that separates hard pairs from easy ones, a "
            "directory or hub id; the SFT model can be one."
        )
    for name in ("rate", "hard_rate", "easy_rate"):
        if getattr(options, name) is not None:
            require_rate(f"--{name}", getattr(options, name))
