"""How a command declares its options: dataclass fields with a help text."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from softpref.errors import UsageError


def option(text: str, default: Any = None) -> Any:
    """Declare an option with its help text."""
    return field(default=default, metadata={"help": text})


def require(value: Any, flag: str) -> None:
    """Refuse a command that lacks an option it cannot do without."""
    if value is None or value == "":
        raise UsageError(f"{flag} is missing.")
