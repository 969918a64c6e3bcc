"""`softpref study TARGET`: a grid of runs that survives being killed, and its table."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from softpref.algorithm.methods import METHODS
from softpref.errors import UsageError
from softpref.options import option, require
from softpref.study.grid import Cell, Target
from softpref.study.presets import InWorld, OnFiles, Preset
from softpref.study.results import Results, code_version
from softpref.study.tables import latex, markdown
from softpref.study.targets import TARGETS
from softpref.training.output import write_text

logger = logging.getLogger(__name__)

USUAL = ("informative", "recommended")
SEEDS = (0, 1, 2)  # as many as the paper has
SFT_DATA = ("disjoint", "clean_chosen", "noisy_chosen")


@dataclass
class StudyOptions:
    """Options of `softpref study TARGET`."""

    preset: Literal["world", "tiny"] = option(
        "`world`: the synthetic language; `tiny`: a small model and files of your own.", "world"
    )
    signal: Literal["informative", "misleading"] = option(
        "World: whether PPLDiff can be trusted, or speaks for the wrong answer to some prompts.",
        "informative",
    )
    methods: list[str] | None = option("Methods; default: the target's.")
    noise: list[float] | None = option("Noise rates, shares in [0, 1); default: the target's.")
    seeds: list[int] | None = option(
        "Seeds; default 0 1 2. Those from 1000 are for trying things out."
    )
    recipe: Literal["recommended", "faithful"] = option("Recipe of the runs.", "recommended")
    sft_data: list[str] | None = option(
        "What SFT has seen: `disjoint` pairs (default), or in a second pass the training pairs' "
        "`clean_chosen` (default with --recipe faithful) or `noisy_chosen` responses."
    )
    jobs: int = option("Worker processes, one thread each; default: one a processor.")
    model: str | None = option("tiny: the SFT model.")
    train: str | None = option("tiny: training pairs.")
    clean: str | None = option("tiny: trusted pairs.")
    test: str | None = option("tiny: pairs to measure on.")
    output: str = option("Directory of the study; a study that was cut off goes on there.", "")


def run_study(name: str, options: StudyOptions) -> None:
    """Run what is missing of a target's grid and write its table.

    The directory gets `TARGET.json`, `.md` and `.tex`, renewed as cells finish, and below `cells/`
    a directory for each run, of which the weights are not kept.

    Raises:
        UsageError: an option is wrong, the directory holds results of another version, or some of
            the runs failed (the others were finished).
    """
    target, preset, output = _checked(name, options)
    cells = _cells(target, options)
    special = [part for part in (options.signal, options.recipe) if part not in USUAL]
    path = output / f"{'-'.join([name, *special])}.json"
    version = {"code": code_version(), **preset.version}
    output.mkdir(parents=True, exist_ok=True)
    results = Results.load(path, version)
    missing = [cell for cell in cells if cell.key not in results.cells]
    logger.info("%s: %d runs, %d of them done", name, len(cells), len(cells) - len(missing))
    failed = {}
    home = output / "cells" / results.version_hash
    jobs = options.jobs or os.cpu_count() or 1
    for cell, outcome in _finished(target, preset, missing, home, jobs):
        if isinstance(outcome, str):
            failed[cell.key] = outcome
            logger.warning("%s failed: %s", cell.key, outcome)
            continue
        results.add(cell.key, outcome)
        _write(path, target, cells, results)
    _write(path, target, cells, results)
    if target.picture and results.cells:
        figure = target.picture(cells, results.cells)
        for kind in ("png", "svg"):
            figure.savefig(path.with_suffix(f".{kind}"), dpi=130)
    logger.info(
        "written: %s and beside it its table%s", path, " and picture" * bool(target.picture)
    )
    if failed:
        first, why = next(iter(failed.items()))
        raise UsageError(
            f"{len(failed)} of {len(cells)} runs failed; the same command tries them again. The "
            f"first of them, {first}: {why}"
        )


def _cells(target: Target, options: StudyOptions) -> list[Cell]:
    sft_data = options.sft_data
    if not sft_data and options.recipe == "faithful" and "sft_data" not in target.axes:
        sft_data = ["clean_chosen"]  # as the paper does
    return target.cells(
        options.seeds or SEEDS, method=options.methods, noise_rate=options.noise,
        recipe=[options.recipe], sft_data=sft_data,
    )  # fmt: skip


def _checked(name: str, options: StudyOptions) -> tuple[Target, Preset, Path]:
    if name not in TARGETS:
        raise UsageError(
            f"no target {name!r}: name one first, softpref study TARGET; there are "
            f"{', '.join(TARGETS)}."
        )
    require(options.output, "--output")
    for method in options.methods or ():
        if method not in METHODS:
            raise UsageError(f"--methods {method}: choose from {', '.join(METHODS)}.")
    for rate in options.noise or ():
        if not 0 <= rate < 1:
            raise UsageError(f"--noise {rate}: give shares of pairs in [0, 1).")
    for seen in options.sft_data or ():
        if seen not in SFT_DATA:
            raise UsageError(f"--sft_data {seen}: choose from {', '.join(SFT_DATA)}.")
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: must be at least 1.")
    output = Path(options.output)
    files = ("model", "train", "clean", "test")
    if options.preset == "tiny":
        if TARGETS[name].needs_world:
            raise UsageError(
                f"{name} needs the world, which has a checker and models of two sizes: leave "
                "--preset out."
            )
        for flag in files:
            require(getattr(options, flag), f"--{flag}")
        return TARGETS[name], OnFiles(*(getattr(options, flag) for flag in files)), output
    for flag in files:
        if getattr(options, flag) is not None:
            raise UsageError(f"--{flag}: the world makes its own; leave it out.")
    world_home = output / "worlds" / code_version()
    return TARGETS[name], InWorld(options.signal, world_home), output


def _finished(
    target: Target, preset: Preset, cells: Sequence[Cell], home: Path, jobs: int
) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
    """Yield every cell with its numbers, or with what went wrong, as workers finish them."""
    if not cells:
        return
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_quiet_worker, initargs=(home,)
    )
    shared = dict.fromkeys((cell.seed, cell.model_size) for cell in cells)
    waiting: dict[Future[Any], Cell | tuple[int, str]] = {
        pool.submit(preset.prepare, *of): of for of in shared
    }
    try:
        with tqdm(total=len(cells), desc="study", unit="run", disable=None) as bar:
            while waiting:
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    finished = waiting.pop(done)
                    if isinstance(finished, Cell):
                        bar.update()
                        yield finished, _outcome(done, home)
                        continue
                    done.result()
                    for cell in cells:
                        if (cell.seed, cell.model_size) == finished:
                            waiting[pool.submit(_run_cell, target, preset, cell, home)] = cell
    finally:
        pool.shutdown(cancel_futures=True)  # else an interrupted study would run to its end


def _outcome(done: Future[dict[str, Any]], home: Path) -> dict[str, Any] | str:
    error = done.exception()
    if error is None:
        return done.result()
    if isinstance(error, UsageError):
        return str(error)
    return f"{type(error).__name__}: {error}; what the run said is in {home}/worker-*.log"


def _run_cell(target: Target, preset: Preset, cell: Cell, home: Path) -> dict[str, Any]:
    """Run a cell in a directory of its own, unless it was finished there before."""
    directory = home / cell.key
    done = directory / "cell.json"
    if not done.is_file():
        shutil.rmtree(directory, ignore_errors=True)
        numbers = preset.run(cell, directory)
        write_text(
            done, json.dumps(numbers | {"run": f"cells/{home.name}/{cell.key}"}, indent=1) + "\n"
        )
    numbers = json.loads(done.read_text(encoding="utf-8"))
    if target.reading and METHODS[cell.method].teaches:
        numbers["reading"] = target.reading(directory)
    return numbers


def _quiet_worker(logs: Path) -> None:
    """One thread each, since workers share the processors; what runs say goes to a file.

    A worker does not outlive the study: it would write where the next one goes on.
    """
    import torch

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
    write_text(path.with_suffix(".md"), markdown(target, cells, results.cells) + text)
    write_text(path.with_suffix(".tex"), latex(target, cells, results.cells))
