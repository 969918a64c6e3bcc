"""Column names of a source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from softpref.options import option


@dataclass(frozen=True)
class Columns:
    """Names of a pair's columns; `system` is read only if it is named.

    With `or_standard`, a column that is missing under its name is read under the standard name.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = None
    or_standard: bool = False

    def of(self, raw: Mapping[str, Any]) -> Columns:
        """Return the names in a row; `system` and `question` columns imply their roles."""
        if self == STANDARD and "prompt" not in raw and {"system", "question"} <= raw.keys():
            return Columns(prompt="question", system="system")
        if not self.or_standard:
            return self
        standard: dict[str, Any] = {
            name: name
            for name in ("prompt", "chosen", "rejected")
            if getattr(self, name) not in raw and name in raw
        }
        return replace(self, **standard)

    def swapped(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with its two responses swapped."""
        own = self.of(raw)
        return {**raw, own.chosen: raw[own.rejected], own.rejected: raw[own.chosen]}

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
