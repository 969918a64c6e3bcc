"""`softpref study TARGET`: a grid of runs that survives being killed, and its table.

Several processes, on one machine or many, may work on one output: each takes what none has claimed.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from softpref.algorithm.methods import METHODS
from softpref.errors import UsageError
from softpref.memory import is_out_of_memory, memory_message
from softpref.plots import save_figure
from softpref.study.choices import USUAL, StudyOptions, asked_cells, checked
from softpref.study.claims import claimed
from softpref.study.grid import Cell, Target
from softpref.study.paper import estimate
from softpref.study.presets import Preset
from softpref.study.real import OnReal
from softpref.study.results import Results, code_version
from softpref.study.tables import latex, markdown
from softpref.training.output import write_text

PATIENCE = 1.0
"""Seconds to wait for another process before something else is looked at."""

logger = logging.getLogger(__name__)


def run_study(name: str, options: StudyOptions) -> None:
    """Run what is missing of a target's grid and write its table.

    The directory gets `TARGET.json`, `.md` and `.tex`, renewed as cells finish, and below `cells/`
    a directory for each run, of which the weights are not kept.

    Raises:
        UsageError: an option is wrong, the directory holds results of another version, or some of
            the runs failed (the others were finished).
    """
    target, preset, output = checked(name, options)
    cells = asked_cells(target, options)
    jobs = options.jobs or os.cpu_count() or 1
    if options.dry_run:
        logger.info("%s", _dry(preset, options, cells, jobs))
        return
    special = [part for part in (options.signal, options.recipe) if part not in USUAL]
    path = output / f"{'-'.join([name or options.preset, *special])}.json"
    version = {"code": code_version(), **preset.version}
    if "scorer" in target.axes:
        version["auditing"] = code_version(["auditing"])
    output.mkdir(parents=True, exist_ok=True)
    results = Results.load(path, version)
    missing = [cell for cell in cells if _is_missing(results.cells.get(cell.key), preset)]
    done = len(cells) - len(missing)
    logger.info("%s: %d runs, %d of them done", path.stem, len(cells), done)
    if missing and isinstance(preset, OnReal):
        logger.info("%s", _timed(preset, missing, jobs))
    failed, elsewhere = {}, 0
    home = output / "cells" / results.version_hash
    for cell, outcome in _finished(target, preset, missing, home, jobs):
        if isinstance(outcome, str):
            failed[cell.key] = outcome
            logger.warning("%s failed: %s", cell.key, outcome)
        elif outcome is None:
            elsewhere += 1
        else:
            with claimed(home, path.name, patience=-1):
                results = Results.load(path, version)  # with what others have added
                results.add(cell.key, outcome)
                _write(path, target, cells, results)
    with claimed(home, path.name, patience=-1):
        results = Results.load(path, version)
        _write(path, target, cells, results)
        _draw(path, target, cells, results)
    if results.cells:
        picture = " and picture" * bool(target.picture)
        logger.info("written: %s and beside it its table%s", path, picture)
    if elsewhere:
        logger.info("%d runs are other processes' at this moment; the last to finish writes the "
                    "whole table, the same command takes over what died", elsewhere)  # fmt: skip
    if failed:
        first, why = next(iter(failed.items()))
        raise UsageError(
            f"{len(failed)} of {len(cells)} runs failed; the same command tries them again. The "
            f"first of them, {first}: {why}"
        )


def _dry(preset: Preset, options: StudyOptions, cells: Sequence[Cell], jobs: int) -> str:
    if isinstance(preset, OnReal):
        return f"{_timed(preset, cells, jobs)} Nothing was run."
    return estimate(str(options.model), cells, preset.judge)


def _timed(preset: OnReal, cells: Sequence[Cell], jobs: int) -> str:
    """Return what the cells would take, from steps that are timed in a worker like the cells'."""
    with (
        TemporaryDirectory() as logs,
        ProcessPoolExecutor(
            1, _context(), initializer=_quiet_worker, initargs=(Path(logs), dict(os.environ))
        ) as pool,
    ):
        return pool.submit(preset.estimate, cells, jobs).result()


def _is_missing(numbers: dict[str, Any] | None, preset: Preset) -> bool:
    """Return whether a cell is to be run: not done, or a judge failed and may be asked again."""
    if numbers is None:
        return True
    again = preset.judge is not None and preset.judge.retry_failed
    return again and any(n for name, n in numbers.items() if name.endswith("_failed"))


def _finished(
    target: Target, preset: Preset, cells: Sequence[Cell], home: Path, jobs: int
) -> Iterator[tuple[Cell, dict[str, Any] | str | None]]:
    """Yield every cell as workers finish them.

    With its numbers, or with what went wrong, or with None where another process has claimed it.
    """
    if not cells:
        return
    started = time.time()
    pool = ProcessPoolExecutor(
        jobs, _context(), initializer=_quiet_worker, initargs=(home, dict(os.environ))
    )
    waiting: dict[Future[Any], Cell | tuple[Any, ...]] = {
        pool.submit(_prepare, preset, shared, home): shared
        for shared in dict.fromkeys(map(preset.shared, cells))
    }
    try:
        with tqdm(total=len(cells), desc="study", unit="run", disable=None) as bar:
            while waiting:
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    finished = waiting.pop(done)
                    outcome = _outcome(done, home)
                    if isinstance(finished, Cell):
                        bar.update()
                        yield finished, outcome
                        continue
                    if outcome is False:  # another process is at it: the others first
                        waiting[pool.submit(_prepare, preset, finished, home)] = finished
                        continue
                    for cell in (cell for cell in cells if preset.shared(cell) == finished):
                        if isinstance(outcome, str):  # nothing to run it with
                            bar.update()
                            yield cell, outcome
                        else:
                            waiting[pool.submit(_run_cell, target, preset, cell, home, started)] = (
                                cell
                            )
    finally:
        pool.shutdown(cancel_futures=True)  # else an interrupted study would run to its end


def _outcome(done: Future[Any], home: Path) -> Any:
    """Return what came out, or in words what went wrong."""
    error = done.exception()
    if error is None:
        return done.result()
    if isinstance(error, UsageError):
        return str(error)
    if is_out_of_memory(error):
        return memory_message("study", error)
    return f"{type(error).__name__}: {error}; the run's log is in {home}/worker-*.log"


def _prepare(preset: Preset, shared: tuple[Any, ...], home: Path) -> bool:
    """Make what cells share; return whether it is made, and not another process at it."""
    whose = home.parents[1]  # the output: results of other versions may share a world
    with claimed(whose, "-".join(map(str, ("shared", *shared))), patience=PATIENCE) as mine:
        if mine:
            preset.prepare(*shared)
        return mine


def _run_cell(
    target: Target, preset: Preset, cell: Cell, home: Path, started: float
) -> dict[str, Any] | None:
    """Run a cell in a directory of its own, unless it was finished there before or is claimed."""
    with claimed(home, cell.key) as mine:
        return _run_claimed(target, preset, cell, home, started) if mine else None


def _run_claimed(
    target: Target, preset: Preset, cell: Cell, home: Path, started: float
) -> dict[str, Any]:
    directory = home / cell.key
    done = directory / "cell.json"
    is_done = done.is_file()
    if is_done and done.stat().st_mtime < started:  # else another process has just asked again
        is_done = not _is_missing(json.loads(done.read_text(encoding="utf-8")), preset)
    if not is_done:
        shutil.rmtree(directory, ignore_errors=True)
        numbers = preset.run(cell, directory)
        write_text(
            done, json.dumps(numbers | {"run": f"cells/{home.name}/{cell.key}"}, indent=1) + "\n"
        )
    numbers = json.loads(done.read_text(encoding="utf-8"))
    if target.reading and METHODS[cell.method].teaches:
        numbers["reading"] = target.reading(directory)
    return numbers


def _context() -> multiprocessing.context.BaseContext:
    """Return how workers start: from a process that has imported all once, where there is one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _quiet_worker(logs: Path, environment: dict[str, str]) -> None:
    """One thread each, since workers share the processors; what runs say goes to a file.

    A worker does not outlive the study: it would write where the next one resumes.
    """
    import torch

    os.environ |= environment  # the process that it was forked from may have an older one
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"worker-{os.getpid()}.log").open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write(path: Path, target: Target, cells: Sequence[Cell], results: Results) -> None:
    text = target.text(cells, results.cells) if target.text else ""
    if target.picture:
        text += f"\n![{target.title}]({path.with_suffix('.png').name})\n"
    write_text(path.with_suffix(".md"), markdown(target, cells, results.cells) + text)
    write_text(path.with_suffix(".tex"), latex(target, cells, results.cells))


def _draw(path: Path, target: Target, cells: Sequence[Cell], results: Results) -> None:
    if target.picture and results.cells:
        figure = target.picture(cells, results.cells)
        for kind in ("png", "svg"):
            save_figure(figure, path.with_suffix(f".{kind}"))
