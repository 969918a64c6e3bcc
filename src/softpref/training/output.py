"""Output directories, and files that are whole or not there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from softpref.data.temporary import collect_partials, fsync, replacing
from softpref.errors import UsageError
from softpref.places import directory_to_write
from softpref.training.checkpoints import newest_complete
from softpref.training.seals import PARTIAL

logger = logging.getLogger(__name__)

TOGETHER = f"{PARTIAL}files"


def new_directory(path: str) -> Path:
    """Return an output directory that is not there yet, or empty but for what a kill left.

    Raises:
        UsageError: it holds something, or cannot be written.
    """
    directory = directory_to_write(path)
    collect_partials(directory)
    if directory.is_dir() and any(entry.name != TOGETHER for entry in directory.iterdir()):
        raise UsageError(f"--output {path}: is not empty; choose a new directory.")
    return directory


def run_directory(path: str, resume: str | None, *, finished: str) -> tuple[Path, str | None]:
    """Return a run's output directory, and the checkpoint that the same command resumes from.

    Args:
        path: of `--output`.
        resume: of `--resume_from_checkpoint`; None leaves it to what lies in the directory.
        finished: the file that a run writes last.

    Raises:
        UsageError: the directory holds a finished run or something else.
    """
    directory = Path(path)
    if resume_point(resume) is True and (directory / finished).exists():
        raise UsageError(f"--output {path}: holds a finished run; choose a new directory.")
    if resume_point(resume) or not directory.is_dir() or not any(directory.iterdir()):
        return directory, resume
    names = [entry.name for entry in directory.iterdir()]
    if resume is None and finished not in names:
        checkpoint, skipped = newest_complete(directory)
        for damaged, reason in skipped:
            logger.warning("%s is skipped: %s", damaged, reason)
        if checkpoint is not None:
            logger.info("resuming from %s", checkpoint)
            return directory, str(checkpoint)
        if all(name.startswith(PARTIAL) for name in names):  # killed in its first save
            return directory, None
    what = "a finished run" if finished in names else "something else, or no complete checkpoint"
    raise UsageError(f"--output {path}: holds {what}; choose a new directory.")


def resume_point(value: str | None) -> str | bool | None:
    """Return `True` for the newest complete checkpoint, a path, or None."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


def write_text(path: Path, text: str) -> None:
    """Write a file under another name, one of this process alone, and rename it."""
    _write(path, [text])


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Take a file or directory for this process alone, by a lock beside it that goes afterwards.

    The lock is the same by whatever symbolic links it is reached. What a killed process left
    half-written there is removed.

    Raises:
        UsageError: another process has taken it.
    """
    taken = path.resolve()
    taken.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{taken}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"{path}: another process is writing it; wait for it.") from None
    collect_partials(taken if taken.is_dir() else taken.parent)
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held, so that none is torn away
        lock.release()


def first_writes(path: Path, process: int) -> AbstractContextManager[None]:
    """Take a run's directory for the first process, which writes for all, as `one_writer` does."""
    return one_writer(path) if process == 0 else nullcontext()


@contextmanager
def appearing_together(output: Path, last: str) -> Iterator[Path]:
    """Yield a directory whose files replace those of `output` once all of them are whole.

    They are renamed one by one, the one named `last` at the end and its older version away at the
    start, so that a directory which holds it holds files of one making. What a kill leaves is
    distinguished from other contents by `is_unfinished`.
    """
    partial = output / TOGETHER
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(partial.iterdir(), key=lambda path: path.name == last)
        for path in (*files, partial):
            fsync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    (output / last).unlink(missing_ok=True)
    for path in files:
        os.replace(path, output / path.name)
    fsync(output)
    partial.rmdir()


def is_unfinished(output: Path) -> bool:
    """Return whether a directory holds what a kill left of `appearing_together`."""
    return (output / TOGETHER).is_dir()


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines as `write_text` does, one at a time."""
    _write(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, texts: Iterable[str]) -> None:
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(texts)
