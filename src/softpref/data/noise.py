"""Label noise with a known truth: flips a share of the pairs of a file."""

import csv
import itertools
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from softpref.data.readers import read_rows
from softpref.data.sources import Intake
from softpref.errors import UsageError

Row = dict[str, Any]
_CHUNK = 1000  # rows turned into Arrow at a time


@dataclass(frozen=True)
class Injected:
    """What was done: `flipped` of the `pairs` rows were swapped, drawn at `rate`."""

    output: str
    pairs: int
    flipped: int
    rate: float

    @property
    def realised_rate(self) -> float:
        """The share of pairs that were swapped."""
        return self.flipped / self.pairs


def inject(source: str, output: str, rate: float, seed: int) -> Injected:
    """Flips labels at random: each pair independently with probability `rate`, in file order.

    A flip swaps chosen and rejected; order and every other column stay as they are. `is_flipped`
    says of each row whether it now stands against its truth, so it is turned over where the source
    has it, and the same seed twice gives the source back.

    Args:
        source: What `load_pairs` reads; every row must be a good pair.
        output: A new file; its ending says the format: .jsonl, .json, .csv (text only), .parquet.
        rate: Probability of a flip, in [0, 1).
        seed: Seed of the draws.

    Raises:
        UsageError: If the rate is out of range, the source is not good, or the output exists or
            cannot hold the rows; then no output is left behind.
    """
    path = Path(output)
    _check(source, path, rate)
    intake = Intake(source, "stop")
    draw = random.Random(seed)
    flipped = 0

    def noisy_rows() -> Iterator[Row]:
        nonlocal flipped
        for number, raw in read_rows(source):
            pair = intake.admit(number, raw)
            if pair is None or not isinstance(raw, dict):
                continue
            flip = draw.random() < rate
            flipped += flip
            first, second = ("rejected", "chosen") if flip else ("chosen", "rejected")
            is_flipped = pair.get("is_flipped", False) != flip
            labels = {"chosen": raw[first], "rejected": raw[second], "is_flipped": is_flipped}
            yield {**raw, **labels}
        intake.bad.settle(intake.kept)

    with _new_file(path) as temporary:
        if path.suffix.lower() == ".parquet":
            _write_parquet(temporary, noisy_rows(), source)
        else:
            _TEXT_WRITERS[path.suffix.lower()](temporary, noisy_rows())
    return Injected(output, intake.kept, flipped, rate)


def _check(source: str, output: Path, rate: float) -> None:
    if not 0 <= rate < 1:
        raise UsageError(f"--rate {rate}: give a share of pairs in [0, 1), such as 0.4.")
    if output.suffix.lower() not in (*_TEXT_WRITERS, ".parquet"):
        endings = ", ".join((*_TEXT_WRITERS, ".parquet"))
        raise UsageError(f"--output {output}: unknown ending. Use one of {endings}.")
    if output.resolve() == Path(source).resolve():
        raise UsageError(f"--output {output} is the input. Give another path.")
    if output.exists():
        raise UsageError(f"--output {output} exists. Remove it or give another path.")


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if all went well and removed if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except UsageError:
        raise
    except (OSError, TypeError, ValueError, pa.ArrowException) as error:
        raise UsageError(
            f"--output {path} cannot be written: {error}. Give a path in a folder that exists, "
            "with an ending that can hold these columns (.jsonl for messages)."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_jsonl(path: Path, rows: Iterator[Row]) -> None:
    with path.open("x", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_json(path: Path, rows: Iterator[Row]) -> None:
    with path.open("x", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            file.write((",\n" if index else "[\n") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")


def _write_csv(path: Path, rows: Iterator[Row]) -> None:
    with path.open("x", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
            writer.writerow({column: _cell(value) for column, value in row.items()})


def _cell(value: object) -> object:
    if isinstance(value, list | dict):
        raise ValueError("a CSV cell holds text, not lists or objects")
    return str(value).lower() if isinstance(value, bool) else value


def _write_parquet(path: Path, rows: Iterator[Row], source: str) -> None:
    """Keeps the column types of a Parquet source; those of any other are inferred."""
    tables = []
    while chunk := list(itertools.islice(rows, _CHUNK)):
        columns = dict.fromkeys(column for row in chunk for column in row)
        values = {column: [row.get(column) for row in chunk] for column in columns}
        tables.append(pa.table(values, schema=_flagged_schema(source)))
    pq.write_table(pa.concat_tables(tables, promote_options="permissive"), path)


def _flagged_schema(source: str) -> pa.Schema | None:
    if not source.lower().endswith(".parquet"):
        return None
    schema = pq.read_schema(source).remove_metadata()
    types = [schema.field(column).type for column in ("chosen", "rejected")]
    if types[0] != types[1] and any(map(pa.types.is_nested, types)):
        # A swap into a column without room for a message's other fields would lose them unseen.
        raise ValueError("the messages of chosen and rejected have different fields")
    flag = pa.field("is_flipped", pa.bool_())
    index = schema.get_field_index(flag.name)
    return schema.append(flag) if index < 0 else schema.set(index, flag)


_TEXT_WRITERS = {".jsonl": _write_jsonl, ".json": _write_json, ".csv": _write_csv}
