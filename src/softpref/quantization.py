"""Options of commands that load a model's linear layers in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from softpref.errors import UsageError, require_package
from softpref.options import option

Bits = Literal[4, 8]
LOAD_IN = ("load_in_4bit", "load_in_8bit")


@dataclass(kw_only=True)
class QuantizationOptions:
    """Options of commands that can load their model quantized by bitsandbytes."""

    load_in_4bit: bool = option(
        "Load linear layers in 4 bits (NF4); needs softpref[quantized].",
        False,
        group="hardware",
        identity=True,
    )
    load_in_8bit: bool = option(
        "Load linear layers in 8 bits; needs softpref[quantized].",
        False,
        group="hardware",
        identity=True,
        rare=True,
    )

    def bits(self) -> Bits | None:
        """Return the bits to load linear layers in, None for the weights as they are.

        Raises:
            UsageError: both are asked for, or bitsandbytes is not installed.
        """
        return bits_of(self.load_in_4bit, self.load_in_8bit)


def bits_of(in_4bit: bool, in_8bit: bool, option: str = "--load_in") -> Bits | None:
    """Return the bits of two options, whose names begin with `option`.

    Raises:
        UsageError: both are asked for, or bitsandbytes is not installed.
    """
    if in_4bit and in_8bit:
        raise UsageError(f"{option}_4bit and {option}_8bit: give one of them.")
    bits: Bits | None = 4 if in_4bit else 8 if in_8bit else None
    if bits:
        require_package("bitsandbytes", "quantized", f"{option}_{bits}bit")
    return bits
