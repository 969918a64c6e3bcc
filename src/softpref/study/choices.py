"""The options of `softpref study`, turned into a target, its cells and a preset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from softpref.algorithm.methods import METHODS
from softpref.errors import UsageError, require_package
from softpref.judging.ask import make_judge
from softpref.judging.options import JudgeOptions, judge_from_file
from softpref.options import option, refuse_too_small, require
from softpref.places import directory_to_write
from softpref.study.grid import Cell, Target
from softpref.study.paper import DATA, MODELS, PAPER_JUDGE, PaperPreset
from softpref.study.presets import FilesPreset, Preset, WorldPreset
from softpref.study.real import REAL, RealPreset
from softpref.study.real_pairs import Sizes, parse_labels, set_name
from softpref.study.results import code_version
from softpref.study.scorers import SCORERS
from softpref.study.targets import TARGETS

DEFAULT_PARTS = ("informative", "recommended")
"""Defaults that the names of results omit."""
SEEDS = (0, 1, 2)  # as many as in the paper
SFT_DATA = ("disjoint", "clean_chosen", "noisy_chosen")


@dataclass
class StudyOptions:
    """Options of `softpref study TARGET`."""

    GROUP: ClassVar[str] = "method"

    preset: Literal["world", "tiny", "paper", "real"] = option(
        "`world`: the synthetic language; `tiny`: a small model and files of your own; `paper`: "
        "the paper's models and data, from a hub; `real`: any chat model and files of pairs with "
        "known right labels; it has its own table and takes no TARGET.",
        "world",
    )
    signal: Literal["informative", "misleading"] = option(
        "World: whether PPLDiff is reliable, or favors the wrong answer to some prompts.",
        "informative",
    )
    methods: list[str] | None = option("Methods; default: the target's.", metavar="NAME")
    noise: list[float] | None = option("Noise rates, shares in [0, 1); default: the target's.")
    seeds: list[int] | None = option(
        "Seeds; default 0 1 2. Use seeds from 1000 on for development."
    )
    recipe: Literal["recommended", "faithful"] = option("Recipe of the runs.", "recommended")
    sft_data: list[str] | None = option(
        "Training data of SFT: `disjoint` pairs (default), or in a second pass `clean_chosen` "
        "(default with --recipe faithful) or `noisy_chosen` responses of the training pairs.",
        metavar="NAME",
    )
    scorers: list[str] | None = option(
        "audit, audit_difficulty: methods of finding wrong labels; default: all. "
        "`confident_learning` needs cleanlab, which softpref[cleanlab] installs.",
        metavar="NAME",
    )
    judge: str | None = option(
        "YAML file with the options of `softpref judge`, for the judge of every win rate; `none`: "
        "no judge. Default: the checker in `world`, none in `tiny`, and gpt-4-0613 in one random "
        "order in `paper`, as in the paper.",
        metavar="FILE",
        group="judge",
    )
    judge_key: str | None = option(
        "NAME=ADDRESS for --judge: the environment variable with the API key, and the address "
        "to send it to, which is base_url in the file.",
        metavar="NAME=ADDRESS",
        group="judge",
    )
    jobs: int = option(
        "Worker processes, one thread each; default: one per processor.", least=1, group="hardware"
    )
    model: str | None = option(
        "tiny: the SFT model; paper: llama-2-7b or phi-2; real: a directory or hub id.",
        metavar="DIR|ID",
        group="data",
    )
    data: str | None = option("paper: hh (Golden HH) or oasst1.", metavar="NAME", group="data")
    dry_run: bool = option(
        "Log the runs of the grid, and for paper and real their cost, and run nothing.",
        False,
        group="output",
    )
    train: str | None = option("tiny: training pairs.", metavar="FILE", group="data")
    clean: str | None = option("tiny: trusted pairs.", metavar="FILE", group="data")
    test: str | None = option("tiny: pairs to evaluate on.", metavar="FILE", group="data")
    pairs: list[str] | None = option(
        "real: files of pairs, each one a separate set: with right labels, or with response_1, "
        "response_2, gold and judges.",
        metavar="FILE",
        group="data",
    )
    labels: list[str] | None = option(
        "real: source of training labels: `flips:RATE`, or `judge:NAME` for the verdicts in the "
        "column judges; default flips:0 flips:0.2 flips:0.4.",
        metavar="SOURCE",
        group="data",
    )
    trusted_pairs: int | None = option(
        "real: trusted pairs per cell; default 140.", least=1, group="data"
    )
    train_pairs: int | None = option(
        "real: maximum training pairs per cell; default 400.", least=1, group="data"
    )
    test_pairs: int | None = option(
        "real: held-out pairs per cell; default 200.", least=1, group="data"
    )
    longest: int | None = option(
        "real: maximum characters in prompt and both responses; drop longer pairs; default 700.",
        least=1,
        group="data",
    )
    learning_rate: float | None = option(
        "real: peak learning rate of the adapter; default 2e-4.", group="optimizer"
    )
    epochs: float | None = option(
        "real: passes over the training pairs; default 1.", group="optimizer"
    )
    bf16: bool | None = option(
        "real: run in bfloat16, on a CPU too; default: float32.", group="hardware"
    )
    output: str = option(
        "Directory of the study; an interrupted study resumes in it.",
        "",
        required=True,
        unless="dry_run",
        metavar="DIR",
    )


def selected_cells(target: Target, options: StudyOptions) -> list[Cell]:
    """Return the cells of a target's grid that the options select."""
    if target is REAL:
        return target.cells(
            options.seeds or SEEDS,
            method=options.methods,
            pairs=[set_name(path) for path in options.pairs or ()],
            labels=[parse_labels(labels) for labels in options.labels or ()],
        )
    sft_data = options.sft_data
    if not sft_data and options.recipe == "faithful" and "sft_data" not in target.axes:
        sft_data = ["clean_chosen"]  # as in the paper
    axes = {"method": options.methods, "noise_rate": options.noise, "scorer": options.scorers}
    cells = target.cells(options.seeds or SEEDS, **axes, recipe=[options.recipe], sft_data=sft_data)
    rows, columns = target.rows, target.columns
    places = {(getattr(cell, rows), getattr(cell, columns), cell.seed) for cell in cells}
    if target.metrics and len(places) < len(set(cells)):
        raise UsageError(
            f"the table has {rows} by {columns}: give a single value for everything "
            "else (--methods, --noise, --sft_data), and run the study once for each value."
        )
    return cells


def validated(name: str, options: StudyOptions) -> tuple[Target, Preset, Path]:
    """Return target, preset and output directory; write nothing.

    Raises:
        UsageError: an option is missing, unknown or in conflict with another.
    """
    if options.preset != "real" and name not in TARGETS:
        raise UsageError(
            f"no target {name!r}: start with softpref study TARGET, where TARGET is one of "
            f"{', '.join(TARGETS)}."
        )
    if not options.dry_run:
        require(options, "output")
        directory_to_write(options.output)
    _refuse_unknown("methods", options.methods, METHODS)
    _refuse_unknown("sft_data", options.sft_data, SFT_DATA)
    for rate in options.noise or ():
        if not 0 <= rate < 1:
            raise UsageError(f"--noise {rate}: give shares of pairs in [0, 1).")
    refuse_too_small(options)
    _refuse_foreign_options(options)
    if options.preset == "real":
        return REAL, _on_real(name, options), Path(options.output)
    target, output = TARGETS[name], Path(options.output)
    _check_scorers(name, target, options.scorers)
    if options.judge and not target.compares_answers:
        raise UsageError(f"--judge: {name} measures labels, not answers; leave it out.")
    judge = _judge(options) if target.compares_answers else None
    if options.preset != "world":
        if "model_size" in target.axes:
            raise UsageError(
                f"{name} needs models of two sizes, which only the world has: leave --preset out, "
                "or run table1 with the other model."
            )
        if not judge and {"rival", "measure_every"} & target.axes.keys():
            raise UsageError(f"{name} needs win rates: name a judge with --judge FILE.yaml.")
    preset = _preset(options, output, judge)
    if judge and judge.judge == "endpoint" and not options.dry_run:
        make_judge(judge)  # fails now if the key is missing, not after the first run
    return target, preset, output


def _judge(options: StudyOptions) -> JudgeOptions | None:
    """Return the judge; None if there is none, or if the world's checker judges."""
    if options.judge == "none":
        return None
    if options.judge:
        return judge_from_file(options.judge, "--judge", options.judge_key)
    return PAPER_JUDGE if options.preset == "paper" else None


def _check_scorers(name: str, target: Target, scorers: Sequence[str] | None) -> None:
    if "scorer" not in target.axes:
        if scorers:
            raise UsageError(f"--scorers: {name} measures methods; leave it out.")
        return
    _refuse_unknown("scorers", scorers, SCORERS)
    selected = scorers or target.axes["scorer"]
    if "confident_learning" in selected:
        others = " ".join(other for other in selected if other != "confident_learning")
        remedy = f", or name the others, --scorers {others}"
        require_package("cleanlab", "cleanlab", "--scorers confident_learning", remedy)


FILES = {
    "tiny": ("model", "train", "clean", "test"),
    "paper": ("model", "data"),
    "world": (),
    "real": ("model", "pairs"),
}
SIZES = {"trusted_pairs": 140, "train_pairs": 400, "test_pairs": 200, "longest": 700}
"""Defaults of `real`; learning rate and epochs were chosen with a model of 135 million parameters
on seeds from 1000 on."""
TRAINING = {"learning_rate": 2e-4, "epochs": 1.0, "bf16": False}
ONLY_REAL = ("labels", *SIZES, *TRAINING)
NOT_REAL = {"noise": "--labels", "sft_data": "", "scorers": "", "judge": "--labels judge:NAME"}


def _refuse_foreign_options(options: StudyOptions) -> None:
    own = FILES[options.preset]
    if own:
        require(options, *own)
    optional = ONLY_REAL if options.preset == "real" else ()
    for flag in {flag: None for flags in (*FILES.values(), ONLY_REAL) for flag in flags}:
        if flag not in (*own, *optional) and getattr(options, flag) is not None:
            raise UsageError(f"--{flag} is not read by --preset {options.preset}: leave it out.")


def _preset(options: StudyOptions, output: Path, judge: JudgeOptions | None) -> Preset:
    home = output / "worlds" / code_version()
    if options.preset == "tiny":
        return FilesPreset(**{flag: getattr(options, flag) for flag in FILES["tiny"]}, judge=judge)
    if options.preset == "paper":
        _refuse_unknown("model", [str(options.model)], MODELS)
        _refuse_unknown("data", [str(options.data)], DATA)
        return PaperPreset(str(options.model), str(options.data), home, judge)
    return WorldPreset(options.signal, home, judge)


def _on_real(name: str, options: StudyOptions) -> RealPreset:
    """Return the preset for real pairs after checking its options."""
    if name:
        raise UsageError(f"--preset real takes no target: leave {name} out.")
    for flag, instead in NOT_REAL.items():
        if getattr(options, flag):
            remedy = f"give {instead} instead" if instead else "leave it out"
            raise UsageError(f"--{flag} is not read by --preset real: {remedy}.")
    if options.signal != "informative" or options.recipe != "recommended":
        raise UsageError("--preset real reads neither --signal nor --recipe: leave them out.")
    sizes = _with_defaults(options, SIZES)
    given = _with_defaults(options, TRAINING)
    for flag in ("learning_rate", "epochs"):
        if not given[flag] > 0:
            raise UsageError(f"--{flag} {given[flag]}: must be above 0.")
    training = {("num_train_epochs" if k == "epochs" else k): v for k, v in given.items()}
    files: dict[str, str] = {}
    for path in options.pairs or ():
        if files.setdefault(set_name(path), path) != path:
            raise UsageError(
                f"--pairs {path} is the same as {files[set_name(path)]}: give one of them."
            )
    version = json.dumps([code_version(), options.model, sizes, training])
    home = Path(options.output) / "splits" / hashlib.sha256(version.encode()).hexdigest()[:16]
    return RealPreset(str(options.model), files, Sizes(*sizes.values()), training, home)


def _with_defaults(options: StudyOptions, defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = {flag: getattr(options, flag) for flag in defaults}
    return {**defaults, **{flag: value for flag, value in given.items() if value is not None}}


def _refuse_unknown(flag: str, given: Sequence[str] | None, known: Collection[str]) -> None:
    for value in given or ():
        if value not in known:
            raise UsageError(f"--{flag} {value}: choose from {', '.join(known)}.")
