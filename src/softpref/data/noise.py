"""Label noise with a known truth: flips a share of the pairs of a file."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from softpref.columns import STANDARD, Columns
from softpref.data.bad_rows import BadRow, in_words
from softpref.data.readers import read_rows, schema_of
from softpref.data.sources import Intake
from softpref.data.temporary import replacing
from softpref.data.writers import ENDINGS, Row, write_rows
from softpref.errors import UsageError
from softpref.places import file_to_write


@dataclass(frozen=True)
class Injected:
    """What was done to the pairs of a file.

    Attributes:
        output: The file that was written.
        flips: Whether each pair was swapped, in file order.
        rate: The probability it was drawn at, the mean over the pairs, in [0, 1).
    """

    output: str
    flips: tuple[bool, ...]
    rate: float

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return len(self.flips)

    @property
    def flipped(self) -> int:
        """How many of them were swapped."""
        return sum(self.flips)

    @property
    def realised_rate(self) -> float:
        """The share of pairs that were swapped, in [0, 1]; NaN where there are none."""
        return self.flipped / self.pairs if self.pairs else math.nan

    def among(self, which: Sequence[bool], rate: float) -> "Injected":
        """What was done to some of the pairs, all drawn at this rate; `which` is in file order."""
        flips = tuple(flip for flip, one in zip(self.flips, which, strict=True) if one)
        return Injected(self.output, flips, rate)


def inject(
    source: str, output: str, rate: float | Sequence[float], seed: int, columns: Columns = STANDARD
) -> Injected:
    """Flips labels at random: each pair independently with its probability, in file order.

    A flip swaps chosen and rejected; order and every other column stay as they are. `is_flipped`
    says of each row whether it now stands against its truth, so it is turned over where the source
    has it, and the same seed twice gives the source back. Pair i is flipped where the i-th draw in
    [0, 1) is below its rate: what a seed flips at low rates it flips at higher ones too.

    Args:
        source: What `load_pairs` reads; every row must be a good pair.
        output: A new file; its ending says the format: .jsonl, .json, .csv (text only), .parquet.
        rate: Probability of a flip, in [0, 1): one for all pairs, or one for each in file order.
        seed: Seed of the draws.
        columns: What the source's columns are called.

    Raises:
        UsageError: If a rate is out of range, their number is not that of the pairs, the source is
            not good, or the output exists or cannot hold the rows; then no output is left behind.
    """
    rates = (rate,) if isinstance(rate, int | float) else tuple(rate)
    for each in rates:
        require_rate("--rate", each)
    require_new_file(source, output)
    path = Path(output)
    intake = Intake(source, "skip", columns)  # none is left out: the first of them is named below
    draw = random.Random(seed)
    flips: list[bool] = []

    def noisy_rows() -> Iterator[Row]:
        coming = itertools.repeat(rate) if isinstance(rate, int | float) else iter(rates)
        for number, raw in read_rows(source):
            pair = intake.admit(number, raw)
            if pair is None or not isinstance(raw, dict):
                continue
            flip = draw.random() < next(coming, 0.0)  # too few of them are refused below
            flips.append(flip)
            is_flipped = pair.get("is_flipped", False) != flip
            yield (columns.swapped(raw) if flip else raw) | {"is_flipped": is_flipped}
        refuse_bad_rows(intake.bad.settle(intake.kept), "Fix or remove it")
        intake.say()
        if not isinstance(rate, int | float) and len(rates) != intake.kept:
            raise UsageError(
                f"{len(rates)} rates for the {intake.kept} pairs of {source}: give one for each "
                "pair, or one for all."
            )

    with _new_file(path) as temporary:
        schema = _flagged_schema(source) if path.suffix.lower() == ".parquet" else None
        write_rows(temporary, noisy_rows(), output, schema)
    return Injected(output, tuple(flips), math.fsum(rates) / len(rates))


def require_rate(flag: str, rate: float) -> None:
    """Makes sure that a rate is one at which labels can be flipped.

    Raises:
        UsageError: If it lies outside [0, 1); the message names the flag that gave it.
    """
    if not 0 <= rate < 1:
        raise UsageError(f"{flag} {rate}: give a share of pairs in [0, 1), such as 0.4.")


def refuse_bad_rows(bad_rows: Sequence[BadRow], remedy: str) -> None:
    """Stops at bad rows where none can be left out, because every pair of the file is needed.

    Raises:
        UsageError: If there are any; the message names the first of each kind, counts the others,
            and ends with the remedy.
    """
    if bad_rows:
        raise UsageError(f"{in_words(bad_rows)}. {remedy}.")


def require_new_file(source: str, output: str) -> None:
    """Makes sure, before any work is done, that the output of `inject` can be made.

    Raises:
        UsageError: If its ending is unknown, it is the source or exists, or its folder is missing.
    """
    path = file_to_write(output)
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"--output {path}: unknown ending. Use one of {', '.join(ENDINGS)}.")
    if path.resolve() == Path(source).resolve():
        raise UsageError(f"--output {path} is the input. Give another path.")
    _refuse_to_write_over(path)
    if not path.parent.is_dir():
        raise UsageError(
            f"--output {path} cannot be written: there is no folder {path.parent}. Make it first."
        )


def _refuse_to_write_over(path: Path) -> None:
    if path.exists():
        raise UsageError(f"--output {path} exists. Remove it or give another path.")


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if all went well and removed if not."""
    try:
        with replacing(path) as temporary:
            yield temporary
            _refuse_to_write_over(path)  # what another command has written meanwhile
    except UsageError:
        raise
    except (OSError, TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise UsageError(
            f"--output {path} cannot be written: {error}. Give a path in a folder that exists, "
            "with an ending that can hold these columns (.jsonl for messages)."
        ) from error


def _flagged_schema(source: str) -> pa.Schema | None:
    """Return a source's schema, if it has one, with its metadata and with `is_flipped`."""
    schema = schema_of(source)
    if schema is None or not {"chosen", "rejected"} <= set(schema.names):
        return schema  # its rows say what is missing
    types = [schema.field(column).type for column in ("chosen", "rejected")]
    if types[0] != types[1] and any(map(pa.types.is_nested, types)):
        # A swap into a column without room for a message's other fields would lose them unseen.
        raise ValueError("the messages of chosen and rejected have different fields")
    flag = pa.field("is_flipped", pa.bool_())
    index = schema.get_field_index(flag.name)
    return schema.append(flag) if index < 0 else schema.set(index, flag)
