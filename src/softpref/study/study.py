"""`softpref study TARGET`: run a resumable grid of cells, and write its table.

Several processes, on one machine or many, can share an output: each runs unclaimed cells.
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
from softpref.study.choices import DEFAULT_PARTS, StudyOptions, selected_cells, validated
from softpref.study.claims import claimed
from softpref.study.grid import Cell, Target
from softpref.study.paper import estimate
from softpref.study.presets import Preset
from softpref.study.real import RealPreset
from softpref.study.results import Results, code_version
from softpref.study.tables import latex, markdown
from softpref.training.output import write_text

PATIENCE = 1.0
"""Seconds to wait for another process before trying the next task."""

logger = logging.getLogger(__name__)


def run_study(name: str, options: StudyOptions) -> None:
    """Run the missing cells of a target's grid and write its table.

    The directory gets `TARGET.json`, `.md` and `.tex`, updated as cells finish, and in `cells/` a
    directory for each run, without weights.

    Raises:
        UsageError: an option is wrong, the directory has results of another version, or some of
            the runs failed (the others are finished).
    """
    target, preset, output = validated(name, options)
    cells = selected_cells(target, options)
    jobs = options.jobs or os.cpu_count() or 1
    if options.dry_run:
        logger.info("%s", _dry_run(preset, options, cells, jobs))
        return
    special = [part for part in (options.signal, options.recipe) if part not in DEFAULT_PARTS]
    path = output / f"{'-'.join([name or options.preset, *special])}.json"
    version = {"code": code_version(), **preset.version}
    if "scorer" in target.axes:
        version["auditing"] = code_version(["auditing"])
    output.mkdir(parents=True, exist_ok=True)
    results = Results.load(path, version)
    missing = [cell for cell in cells if _is_missing(results.cells.get(cell.key), preset)]
    done = len(cells) - len(missing)
    logger.info("%s: %d runs, %d of them done", path.stem, len(cells), done)
    if missing and isinstance(preset, RealPreset):
        logger.info("%s", _timed(preset, missing, jobs))
    failed, elsewhere = {}, 0
    home = output / "cells" / results.version_hash
    for cell, outcome in _run_cells(target, preset, missing, home, jobs):
        if isinstance(outcome, str):
            failed[cell.key] = outcome
            logger.warning("%s failed: %s", cell.key, outcome)
        elif outcome is None:
            elsewhere += 1
        else:
            with claimed(home, path.name, patience=-1):
                results = Results.load(path, version)  # with results of other processes
                results.add(cell.key, outcome)
                _write(path, target, cells, results)
    with claimed(home, path.name, patience=-1):
        results = Results.load(path, version)
        _write(path, target, cells, results)
        _draw(path, target, cells, results)
    if results.cells:
        figure = " and figure" * bool(target.picture)
        logger.info(f"written: {path}, with its table{figure} in the same directory")
    if elsewhere:
        logger.info(
            f"other processes are running {elsewhere} runs; the last to finish writes the whole "
            "table, and the same command takes over runs of killed processes"
        )
    if failed:
        first, why = next(iter(failed.items()))
        raise UsageError(
            f"{len(failed)} of {len(cells)} runs failed; the same command retries them. The first "
            f"one, {first}: {why}"
        )


def _dry_run(preset: Preset, options: StudyOptions, cells: Sequence[Cell], jobs: int) -> str:
    if isinstance(preset, RealPreset):
        return f"{_timed(preset, cells, jobs)} Nothing was run."
    if options.preset == "paper":
        return estimate(str(options.model), cells, preset.judge)
    shared = len(dict.fromkeys(map(preset.shared_key, cells)))
    methods = ", ".join(dict.fromkeys(cell.method for cell in cells))
    return (
        f"{len(cells)} runs ({methods}) after {shared} preparations that they share, in {jobs} "
        "processes of one thread. Nothing was run."
    )


def _timed(preset: RealPreset, cells: Sequence[Cell], jobs: int) -> str:
    """Return the cost of the cells, from steps timed in a worker process."""
    with TemporaryDirectory() as logs, _pool(1, Path(logs)) as pool:
        return pool.submit(preset.estimate, cells, jobs).result()


def _is_missing(numbers: dict[str, Any] | None, preset: Preset) -> bool:
    """Return whether to run a cell: it is not done, or failed judge calls are to be retried."""
    if numbers is None:
        return True
    retries = preset.judge is not None and preset.judge.retry_failed
    return retries and any(n for name, n in numbers.items() if name.endswith("_failed"))


def _run_cells(
    target: Target, preset: Preset, cells: Sequence[Cell], home: Path, jobs: int
) -> Iterator[tuple[Cell, dict[str, Any] | str | None]]:
    """Yield cells as workers finish them.

    A cell comes with its numbers, an error message, or None if another process has claimed it.
    """
    if not cells:
        return
    started = time.time()
    pool = _pool(jobs, home)
    waiting: dict[Future[Any], Cell | tuple[Any, ...]] = {
        pool.submit(_prepare, preset, shared, home): shared
        for shared in dict.fromkeys(map(preset.shared_key, cells))
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
                    if outcome is False:  # another process is preparing it: try later
                        waiting[pool.submit(_prepare, preset, finished, home)] = finished
                        continue
                    for cell in (cell for cell in cells if preset.shared_key(cell) == finished):
                        if isinstance(outcome, str):  # its shared files are missing
                            bar.update()
                            yield cell, outcome
                        else:
                            run = pool.submit(_run_cell, target, preset, cell, home, started)
                            waiting[run] = cell
    finally:
        pool.shutdown(cancel_futures=True)  # else an interrupted study would run to the end


def _outcome(done: Future[Any], home: Path) -> Any:
    """Return the result of a task, or an error message."""
    error = done.exception()
    if error is None:
        return done.result()
    if isinstance(error, UsageError):
        return error.in_flags
    if is_out_of_memory(error):
        return memory_message("study", error)
    return f"{type(error).__name__}: {error}; the run's log is in {home}/worker-*.log"


def _prepare(preset: Preset, shared: tuple[Any, ...], home: Path) -> bool:
    """Make what cells share; return False if another process is doing so."""
    output = home.parents[1]  # results of other versions may share a world
    with claimed(output, "-".join(map(str, ("shared", *shared))), patience=PATIENCE) as mine:
        if mine:
            preset.prepare(*shared)
        return mine


def _run_cell(
    target: Target, preset: Preset, cell: Cell, home: Path, started: float
) -> dict[str, Any] | None:
    """Run a cell in its own directory, unless it is finished or claimed."""
    with claimed(home, cell.key) as mine:
        return _run_claimed(target, preset, cell, home, started) if mine else None


def _run_claimed(
    target: Target, preset: Preset, cell: Cell, home: Path, started: float
) -> dict[str, Any]:
    directory = home / cell.key
    done = directory / "cell.json"
    is_done = done.is_file()
    if is_done and done.stat().st_mtime < started:  # else another process has just retried it
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


def _pool(workers: int, logs: Path) -> ProcessPoolExecutor:
    """Return workers from a fork server with all imports where available, else spawned."""
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context, _quiet_worker, (logs, dict(os.environ)))


def _quiet_worker(logs: Path, environment: dict[str, str]) -> None:
    """Set up a worker: one thread, since workers share the processors, and output in a log file.

    A worker ends with the study, since it would write where the next study resumes.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"worker-{os.getpid()}.log").open("ab") as file:  # first: it takes all errors
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    import torch

    os.environ |= environment  # the fork server may have an older one
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


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
