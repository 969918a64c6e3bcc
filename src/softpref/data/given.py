"""Pairs as callers give them: files, hub ids, and objects in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, TypeAlias

import datasets
import pandas
import pyarrow as pa

from softpref.data.readers import dataset_rows, read_rows
from softpref.errors import UsageError

Given: TypeAlias = (
    str
    | PathLike[str]
    | datasets.Dataset
    | pandas.DataFrame
    | list[str]
    | list[PathLike[str]]
    | list[dict[str, Any]]
)
"""A file, hub id, several of these, a data set, a data frame, or a list of rows."""


@dataclass(frozen=True)
class Source:
    """Rows that can be read again, under the name that messages call them by."""

    name: str
    read: Callable[[], Iterator[tuple[int, object]]]


def sources_of(given: Any, argument: str) -> list[Source]:
    """Return the sources of a set; files have their own names, other objects the argument's.

    Raises:
        UsageError: it is something else; the message names the argument and says what to give.
    """
    if isinstance(given, str | PathLike):
        return [_file(given)]
    if isinstance(given, pandas.DataFrame):
        given = _from_pandas(given, argument)
    if isinstance(given, datasets.Dataset):
        return [Source(argument, lambda: enumerate(dataset_rows(given), start=1))]
    if isinstance(given, list | tuple):
        if given and all(isinstance(each, Source) for each in given):
            return list(given)
        if given and all(isinstance(each, str | PathLike) for each in given):
            return [_file(each) for each in given]
        if not any(isinstance(each, datasets.Dataset) for each in given):
            return [Source(argument, lambda: enumerate(given, start=1))]
    raise UsageError(f"{argument} {_remedy(given, argument)}.")


def _file(path: str | PathLike[str]) -> Source:
    return Source(str(path), partial(read_rows, str(path)))


def _from_pandas(frame: pandas.DataFrame, argument: str) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(
            f"{argument}: its columns make no data set ({first}); give values of one type in each."
        ) from error


def _remedy(given: Any, argument: str) -> str:
    kind = type(given).__name__
    if given is None:
        return "is missing: give a datasets.Dataset, a list of rows, a DataFrame, a path or hub id"
    if isinstance(given, Mapping) and "chosen" in given:
        return f"is a {kind} of columns: give datasets.Dataset.from_dict(...)"
    if isinstance(given, Mapping) and given:
        names, first = ", ".join(map(str, given)), next(iter(given))
        return f"is a {kind} with the splits {names}: give one, such as {argument}[{first!r}]"
    if isinstance(given, datasets.IterableDataset):
        return (
            "is an IterableDataset, and pairs are read several times: give "
            "datasets.Dataset.from_list(list(...)) of it, or load it with streaming=False"
        )
    if isinstance(given, list | tuple):
        return f"is a {kind} of data sets: give datasets.concatenate_datasets(...)"
    return (
        f"is of type {kind}: give a datasets.Dataset, a list of rows, each a dict, a DataFrame, "
        "a path or hub id"
    )
