"""`softpref bench`: time, memory and operations of a training step, compared with TRL's DPO."""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version
from tqdm import tqdm

from softpref.bench.contestants import (
    DPOS,
    MSPO,
    NAMES,
    ON_EVERY_SHAPE,
    Name,
    has_response_only_head,
    make_contestant,
)
from softpref.bench.counting import StepCounts, count_step
from softpref.bench.memory import peak_in_new_process
from softpref.bench.report import LEGEND, Group, draw_step_times, rows, runs
from softpref.bench.timing import time_rounds
from softpref.bench.whole import (
    ENTRANTS,
    cost_record,
    cost_tables,
    given_inputs,
    random_inputs,
    time_commands,
)
from softpref.bench.workload import TUNINGS, ModelSize, Shape, Workload
from softpref.errors import UsageError, require_package
from softpref.models.loading import Tuning
from softpref.options import option, refuse_too_small
from softpref.places import file_to_write
from softpref.training.output import write_text

logger = logging.getLogger(__name__)

_PACKAGES = ("softpref", "torch", "transformers", "trl", "peft")
SLOW: Name = "double_backward"
OLDEST_TRL = "1.16"
WHOLE_ROUNDS = 3


@dataclass(frozen=True)
class BenchPreset:
    """Amount of measurement.

    Attributes:
        workloads: workloads of the timed steps, one for each data shape; memory, and contestants
            outside `ON_EVERY_SHAPE`, are measured on the first only.
        rounds: timed steps of each contestant.
        slow_rounds: timed steps of MSPO by double backward, at most `rounds`.
        peaks: number of processes that measure each contestant's memory.
    """

    workloads: tuple[Workload, ...]
    rounds: int
    slow_rounds: int
    peaks: dict[Name, int]

    def names_on(self, workload: Workload) -> tuple[Name, ...]:
        """Return the contestants on a workload."""
        return NAMES if workload == self.workloads[0] else ON_EVERY_SHAPE

    def rounds_of(self, name: Name) -> int:
        """Return the number of timed steps of a contestant."""
        return min(self.slow_rounds, self.rounds) if name == SLOW else self.rounds


SHAPES = (Shape(128, 64), Shape(32, 128))
SMALL = ModelSize(4096, 256, 688, 6, 4, 2, tie_word_embeddings=False)  # 6.45 M parameters
ONE_BILLION = ModelSize(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True)
PEAKS: dict[Name, int] = {
    "trl_default": 1, "trl_best": 1, "dpo": 3, "mspo_m1/8": 3,
    "dpo_checkpointed": 3, "graph_checkpointed": 3, "recompute_checkpointed": 1,
}  # fmt: skip
PRESETS = {
    "cpu": BenchPreset(
        workloads=tuple(Workload(SMALL, shape, "cpu") for shape in SHAPES),
        rounds=5,
        slow_rounds=2,
        peaks=PEAKS,
    ),
    "gpu": BenchPreset(
        workloads=(Workload(ONE_BILLION, Shape(256, 256), "cuda", pairs=16),),
        rounds=10,
        slow_rounds=3,
        peaks=dict.fromkeys(PEAKS, 1),  # one is enough: torch counts its memory exactly
    ),
}


@dataclass
class BenchOptions:
    """Options of `softpref bench`."""

    preset: Literal["cpu", "gpu"] = option(
        "`cpu`: a 6 M model in float32; `gpu`: a 1 B model in bfloat16; about ten minutes each.",
        "cpu",
    )
    json: str | None = option("Write the numbers to this file.", metavar="FILE")
    plot: str | None = option("Plot the step times to this PNG.", metavar="FILE")
    rounds: int | None = option(
        "Timed steps of each contestant; default: the preset's, or 3 with --whole.", least=1
    )
    whole: bool = option(
        "Time whole commands in place of steps, from their start to the written model, and their "
        "phases: TRL's DPO, `train --method dpo` and `mspo`.",
        False,
    )
    model: str | None = option(
        "With --whole: a model, in place of the preset's random one.", metavar="DIR"
    )
    pairs: str | None = option(
        "With --model: JSONL of pairs; the first 64 train, the next 16 are trusted.", metavar="FILE"
    )


def run_bench(options: BenchOptions) -> None:
    """Measure, print the table, and write the files that options name.

    Raises:
        UsageError: there is no GPU for the preset, or an option is impossible.
    """
    require_package("trl", "sft", "bench")
    if Version(version("trl")) < Version(OLDEST_TRL):
        raise UsageError(
            f"bench needs TRL {OLDEST_TRL} or newer, not {version('trl')}: upgrade trl."
        )
    if options.preset == "gpu" and not torch.cuda.is_available():
        raise UsageError("--preset gpu needs a CUDA device, and torch sees none: try --preset cpu.")
    refuse_too_small(options)
    _refuse_odd_combinations(options)
    for flag, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not file_to_write(path, flag).absolute().parent.is_dir():
            raise UsageError(f"{flag} {path}: its directory does not exist: create it.")
    preset = PRESETS[options.preset]
    if options.whole:
        _time_whole(options, preset)
        return
    for groups in measure_preset(replace(preset, rounds=options.rounds or preset.rounds)):
        if options.json:
            text = json.dumps(environment(options.preset) | {"runs": runs(groups)}, indent=2)
            write_text(Path(options.json), text + "\n")
    _print_table(groups)
    if options.plot:
        draw_step_times(groups, Path(options.plot))


def _refuse_odd_combinations(options: BenchOptions) -> None:
    for name in ("model", "pairs"):
        if getattr(options, name) and not options.whole:
            raise UsageError(f"--{name}: only --whole reads it; leave it out, or give --whole.")
    if bool(options.model) != bool(options.pairs):
        raise UsageError("--model and --pairs: give both, or neither for a random model.")
    if options.plot and options.whole:
        raise UsageError("--plot: plots the times of steps; leave it out with --whole.")


def _time_whole(options: BenchOptions, preset: BenchPreset) -> None:
    workload, rounds = preset.workloads[0], options.rounds or WHOLE_ROUNDS
    total = rounds * len(ENTRANTS)
    with (
        tempfile.TemporaryDirectory() as home,
        tqdm(total=total, desc="measuring", leave=False, disable=None) as bar,
    ):
        if options.model and options.pairs:
            place = Path(home)
            inputs = given_inputs(options.model, options.pairs, workload.device, place)
        else:
            inputs = random_inputs(workload, Path(home))
        for costs in time_commands(inputs, rounds, bar.update):
            if options.json:
                record = environment(options.preset) | {"model": options.model}
                text = json.dumps(record | cost_record(costs), indent=2)
                write_text(Path(options.json), text + "\n")
    for table in cost_tables(costs):
        _print_rows(table)


def measure_preset(preset: BenchPreset) -> Iterator[list[Group]]:
    """Time and count every contestant on every workload, and measure memory on the first.

    Yield the groups when all steps are timed, and again with memory.
    """
    timed = [(workload, tuning) for workload in preset.workloads for tuning in TUNINGS]
    steps = sum(
        1 + preset.rounds_of(name) for workload, _ in timed for name in preset.names_on(workload)
    )
    processes = len(TUNINGS) * sum(preset.peaks.values())
    groups = []
    with tqdm(total=steps + processes, desc="measuring", leave=False, disable=None) as bar:
        for workload, tuning in timed:
            seconds, counts = _time_and_count(preset, workload, tuning, bar.update)
            groups.append(Group(tuning, workload, seconds, {}, counts, has_response_only_head()))
        yield groups
        # Last, since these processes run in parallel and would slow down timed steps.
        for i, tuning in enumerate(TUNINGS):
            peaks = _peaks(preset, preset.workloads[0], tuning, bar.update)
            groups[i] = replace(groups[i], peaks=peaks)
    yield groups


def _time_and_count(
    preset: BenchPreset, workload: Workload, tuning: Tuning, after_step: Callable[[], object]
) -> tuple[dict[Name, list[float]], dict[Name, StepCounts]]:
    with tempfile.TemporaryDirectory() as home:
        names = preset.names_on(workload)
        contestants = {name: make_contestant(name, workload, tuning, Path(home)) for name in names}
        rounds = {name: preset.rounds_of(name) for name in names}
        seconds = time_rounds(contestants, rounds, workload.device, after_step)
        counts = {}
        for name in (*DPOS, *MSPO.values()):
            if seconds[name]:  # else it does not fit
                counts[name] = count_step(partial(contestants[name].step, 0))
                contestants[name].clear()
    del contestants
    gc.collect()  # trainers refer to themselves
    if workload.device == "cuda":
        torch.cuda.empty_cache()
    return seconds, counts


def _peaks(
    preset: BenchPreset, workload: Workload, tuning: Tuning, after_process: Callable[[], object]
) -> dict[Name, list[float]]:
    """Return the peak of every process, MiB; two run in parallel on a CPU, one on a GPU."""
    names = [name for name, count in preset.peaks.items() for _ in range(count)]

    def measure(name: Name) -> float:
        peak = peak_in_new_process(name, workload, tuning)
        after_process()
        return peak

    with ThreadPoolExecutor(2 if workload.device == "cpu" else 1) as pool:
        peaks = list(pool.map(measure, names))
    return {
        name: [peak for other, peak in zip(names, peaks, strict=True) if other == name]
        for name in preset.peaks
    }


def environment(preset: str) -> dict[str, Any]:
    """Return hardware and versions, which the numbers depend on."""
    on_gpu = preset == "gpu"
    return {
        "preset": preset,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, "
        f"{os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _print_table(groups: Sequence[Group]) -> None:
    _print_rows(rows(groups))
    logger.info(LEGEND.format(pairs=groups[0].workload.pairs))


def _print_rows(table: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        logger.info("%s", "  ".join(cells).rstrip())
