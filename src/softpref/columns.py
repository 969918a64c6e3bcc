"""What the columns of a source are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from softpref.options import option


@dataclass(frozen=True)
class Columns:
    """The names of the columns that a pair is read from; `system` is read only where it is named.

    A source that has the standard name instead is read by that.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = None

    def of(self, raw: Mapping[str, Any]) -> Columns:
        """Return the names as a row has them; a system beside a question says what they are."""
        if self == STANDARD and "prompt" not in raw and {"system", "question"} <= raw.keys():
            return Columns(prompt="question", system="system")
        standard = {
            name: name
            for name in ("prompt", "chosen", "rejected")
            if getattr(self, name) not in raw and name in raw
        }
        return replace(self, **standard)

    def swapped(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with its two responses in each other's place."""
        own = self.of(raw)
        return {**raw, own.chosen: raw[own.rejected], own.rejected: raw[own.chosen]}

    @property
    def names(self) -> list[str]:
        """Return the names alone."""
        names = (self.prompt, self.chosen, self.rejected, self.system)
        return [name for name in names if name]


STANDARD = Columns()


@dataclass(kw_only=True)
class ColumnOptions:
    """Options of every command that reads pairs."""

    prompt_column: str = option("Column that holds the prompt.", "prompt")
    chosen_column: str = option("Column that holds the better response.", "chosen")
    rejected_column: str = option("Column that holds the worse response.", "rejected")
    system_column: str | None = option(
        "Column that holds a system message: rows of text become conversations."
    )

    def columns(self) -> Columns:
        """Return the names."""
        return Columns(
            self.prompt_column, self.chosen_column, self.rejected_column, self.system_column
        )
