"""Column names of a source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from softpref.options import option

SoftLabelSource = Literal["column", "votes", "scores"]
SCORES = ("score_chosen", "score_rejected")
VOTES = ("votes_for", "votes_against")
OF_TRAINING = ("weight", "margin")
"""What a training pair may bring beside its label: how often it counts, and a target margin."""
LABEL_NUMBERS = (*OF_TRAINING, *SCORES, *VOTES)
"""Columns of numbers that only some commands read."""


@dataclass(frozen=True)
class Columns:
    """Names of a pair's columns; `system` is read only if it is named.

    With `or_standard`, a column that is missing under its name is read under the standard name.
    Of `LABEL_NUMBERS`, those in `optional` are read where a row has them, and those that
    `soft_label_from` names must be in every row.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = None
    or_standard: bool = field(default=False, compare=False)
    optional: tuple[str, ...] = field(default=(), compare=False)
    soft_label_from: SoftLabelSource | None = field(default=None, compare=False)

    def of(self, raw: Mapping[str, Any]) -> Columns:
        """Return the names in a row; `system` and `question` columns imply their roles."""
        if self == STANDARD and "prompt" not in raw and {"system", "question"} <= raw.keys():
            return replace(self, prompt="question", system="system")
        if not self.or_standard:
            return self
        standard: dict[str, Any] = {
            name: name
            for name in ("prompt", "chosen", "rejected")
            if getattr(self, name) not in raw and name in raw
        }
        return replace(self, **standard)

    def swapped(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with its two responses swapped.

        Scores and votes go with their response, and a `soft_label` p becomes 1 − p, to 15 digits.
        A `margin` stays, though it is of the order before.
        """
        own = self.of(raw)
        partner = {one: other for each in (SCORES, VOTES) for one, other in (each, each[::-1])}
        partner |= {own.chosen: own.rejected, own.rejected: own.chosen}
        moved = {partner.get(name, name): value for name, value in raw.items()}
        swapped = {name: moved[name] for name in [*raw, *moved] if name in moved}  # order kept
        p = raw.get("soft_label")
        if isinstance(p, int | float) and not isinstance(p, bool):
            swapped["soft_label"] = round(1 - p, 15)
        return swapped

    def of_training(self, soft_label_from: SoftLabelSource | None = None) -> Columns:
        """Return what is read of training pairs."""
        return replace(self, optional=OF_TRAINING, soft_label_from=soft_label_from)

    def beside_training(self, *sources: SoftLabelSource) -> Columns:
        """Return what is read of pairs beside training ones; of `sources` alone they need columns.

        They may be the report's export, which has the standard names.
        """
        asked = self.soft_label_from if self.soft_label_from in sources else None
        return replace(self, or_standard=True, optional=(), soft_label_from=asked)

    @property
    def required(self) -> tuple[str, ...]:
        """The columns of numbers that every row must have."""
        return {"votes": VOTES, "scores": SCORES}.get(self.soft_label_from or "", ())

    @property
    def names(self) -> list[str]:
        """The names that are set."""
        names = (self.prompt, self.chosen, self.rejected, self.system)
        return [name for name in names if name]


STANDARD = Columns()


@dataclass(kw_only=True)
class ColumnOptions:
    """Options of every command that reads pairs."""

    GROUP: ClassVar[str] = "data"

    prompt_column: str = option("Column that holds the prompt.", "prompt", metavar="NAME")
    chosen_column: str = option("Column that holds the better response.", "chosen", metavar="NAME")
    rejected_column: str = option(
        "Column that holds the worse response.", "rejected", metavar="NAME"
    )
    system_column: str | None = option(
        "Column that holds a system message; rows of text become conversations.", metavar="NAME"
    )

    def columns(self) -> Columns:
        """Return the column names."""
        return Columns(
            self.prompt_column, self.chosen_column, self.rejected_column, self.system_column
        )
