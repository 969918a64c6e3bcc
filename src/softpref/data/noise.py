"""Label noise with known ground truth: flip a share of the pairs of a file."""

import itertools
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from softpref.columns import SCORES, STANDARD, VOTES, Columns
from softpref.data.bad_rows import BadRow, place, summarize_bad_rows
from softpref.data.label_columns import is_tie
from softpref.data.readers import read_rows, schema_of
from softpref.data.sources import RowValidator
from softpref.data.temporary import replacing
from softpref.data.writers import ENDINGS, Row, write_rows
from softpref.errors import UsageError
from softpref.places import file_to_write

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Injected:
    """The result of flipping the pairs of a file.

    Attributes:
        output: The written file.
        flips: Whether each pair was swapped, in file order.
        rate: The mean probability of a flip over the pairs, in [0, 1).
    """

    output: str
    flips: tuple[bool, ...]
    rate: float

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self.flips)

    @property
    def flipped(self) -> int:
        """Number of swapped pairs."""
        return sum(self.flips)

    @property
    def realised_rate(self) -> float:
        """Share of swapped pairs, in [0, 1]; NaN without pairs."""
        return self.flipped / self.pairs if self.pairs else math.nan

    def among(self, which: Sequence[bool], rate: float) -> "Injected":
        """Return the result for a subset drawn at one rate; `which` selects it in file order."""
        flips = tuple(flip for flip, one in zip(self.flips, which, strict=True) if one)
        return Injected(self.output, flips, rate)


def inject(
    source: str, output: str, rate: float | Sequence[float], seed: int, columns: Columns = STANDARD
) -> Injected:
    """Flip labels at random: each pair independently with its probability, in file order.

    A flip swaps chosen and rejected with their scores and votes, and turns a `soft_label` p into
    1 − p; row order and all other columns are unchanged. A tie is never flipped. `is_flipped`
    marks the rows whose label is now wrong. A value in the source is inverted by a flip, so that
    applying the same seed twice restores the source. Pair i is flipped if the i-th draw in [0, 1)
    is below its rate: a pair that a seed flips at a low rate is flipped at higher rates too.

    Args:
        source: Any source of `load_pairs`; every row must be a valid pair.
        output: A new file: .jsonl, .json, .csv (text only) or .parquet.
        rate: Probability of a flip, in [0, 1): one for all pairs, or one per pair in file order.
        seed: Seed of the draws.
        columns: Column names of the source.

    Raises:
        UsageError: If a rate is out of range, the number of rates is wrong, a row is bad or has a
            `margin`, or the output exists or cannot hold the rows; then no output is written.
    """
    rates = (rate,) if isinstance(rate, int | float) else tuple(rate)
    for each in rates:
        require_rate("--rate", each)
    require_new_file(source, output)
    require_no_margin(source)
    path = Path(output)
    validator = RowValidator(source, "skip", columns)  # bad rows are refused below, all at once
    draw = random.Random(seed)
    flips: list[bool] = []

    def noisy_rows() -> Iterator[Row]:
        coming = itertools.repeat(rate) if isinstance(rate, int | float) else iter(rates)
        for number, raw in read_rows(source):
            pair = validator.validate(number, raw)
            if pair is None or not isinstance(raw, dict):
                continue
            flip = draw.random() < next(coming, 0.0)  # too few rates are refused below
            flip = flip and not is_tie(pair)
            flips.append(flip)
            is_flipped = pair.get("is_flipped", False) != flip
            yield (columns.swapped(raw) if flip else raw) | {"is_flipped": is_flipped}
        refuse_bad_rows(validator.bad.finish(validator.kept), "Fix or remove it")
        validator.log_notes()
        if validator.ties:
            logger.info(f"{source}: {validator.ties} ties are not flipped: they have no label")
        if not isinstance(rate, int | float) and len(rates) != validator.kept:
            raise UsageError(
                f"{len(rates)} rates for the {validator.kept} pairs of {source}: give one for each "
                "pair, or one for all."
            )

    with _new_file(path) as temporary:
        schema = _flagged_schema(source, columns) if path.suffix.lower() == ".parquet" else None
        write_rows(temporary, noisy_rows(), output, schema)
    return Injected(output, tuple(flips), math.fsum(rates) / len(rates))


def require_rate(flag: str, rate: float) -> None:
    """Refuse a rate at which labels cannot be flipped.

    Raises:
        UsageError: If it is outside [0, 1); the message names its flag.
    """
    if not 0 <= rate < 1:
        raise UsageError(f"{flag} {rate}: give a share of pairs in [0, 1), such as 0.4.")


def require_no_margin(source: str) -> None:
    """Refuse a source with target margins, which mean nothing once responses are swapped.

    Raises:
        UsageError: If a row has a `margin`.
    """
    for number, raw in read_rows(source):
        if isinstance(raw, dict) and raw.get("margin") not in (None, ""):
            raise UsageError(
                f"{place(source, number)}: has a `margin`, by which the chosen response is better; "
                "a flip would give it to the other one. Remove the column."
            )


def refuse_bad_rows(bad_rows: Sequence[BadRow], remedy: str) -> None:
    """Refuse bad rows where every pair of the file is needed.

    Raises:
        UsageError: If there are any; the message names the first of each kind, counts the others,
            and ends with the remedy.
    """
    if bad_rows:
        raise UsageError(f"{summarize_bad_rows(bad_rows)}. {remedy}.")


def require_new_file(source: str, output: str) -> None:
    """Refuse, before any work is done, an output that `inject` cannot write.

    Raises:
        UsageError: If its extension is unknown, it is the source or exists, or has no folder.
    """
    path = file_to_write(output)
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"--output {path}: unknown extension. Use one of {', '.join(ENDINGS)}.")
    if path.resolve() == Path(source).resolve():
        raise UsageError(f"--output {path} is the input. Give another path.")
    _refuse_to_overwrite(path)
    if not path.parent.is_dir():
        raise UsageError(
            f"--output {path} cannot be written: there is no folder {path.parent}. Make it first."
        )


def _refuse_to_overwrite(path: Path) -> None:
    if path.exists():
        raise UsageError(f"--output {path} exists. Remove it or give another path.")


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it on success and remove it on failure."""
    try:
        with replacing(path) as temporary:
            yield temporary
            _refuse_to_overwrite(path)  # another command may have written it meanwhile
    except UsageError:
        raise
    except (OSError, TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise UsageError(
            f"--output {path} cannot be written: {error}. Give a path in a folder that exists, "
            "in a format that can hold these columns (.jsonl for messages)."
        ) from error


def _flagged_schema(source: str, columns: Columns) -> pa.Schema | None:
    """Return a source's schema, if any, with its metadata and with `is_flipped`."""
    schema = schema_of(source)
    if schema is None:
        return None
    own = columns.of(dict.fromkeys(schema.names))
    sides = [name for name in (own.chosen, own.rejected) if name in schema.names]
    types = [schema.field(name).type for name in sides]  # a missing one makes every row a bad row
    if len(set(types)) > 1 and any(map(pa.types.is_nested, types)):
        # A swap into a column that lacks a message's other fields would silently lose them.
        raise ValueError(f"the messages of {' and '.join(sides)} have different fields")
    for one, other in (SCORES, VOTES):
        for held, missing in ((one, other), (other, one)):
            if held in schema.names and missing not in schema.names:  # a swap takes it there
                schema = schema.append(schema.field(held).with_name(missing))
        both = {one, other} <= set(schema.names)
        if both and schema.field(one).type != schema.field(other).type:  # a swap would round
            raise ValueError(f"{one} and {other} have different types")
    flag = pa.field("is_flipped", pa.bool_())
    index = schema.get_field_index(flag.name)
    return schema.append(flag) if index < 0 else schema.set(index, flag)
