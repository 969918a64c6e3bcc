"""The options of `softpref study`, and what they ask for: a target, its cells, a preset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from softpref.algorithm.methods import METHODS
from softpref.errors import UsageError, require_package
from softpref.judging.ask import make_judge
from softpref.judging.options import JudgeOptions, judge_from_file
from softpref.options import option, require
from softpref.places import directory_to_write
from softpref.study.grid import Cell, Target
from softpref.study.paper import DATA, MODELS, PAPER_JUDGE, OnPaper
from softpref.study.presets import InWorld, OnFiles, Preset
from softpref.study.real import REAL, OnReal
from softpref.study.real_pairs import Sizes, parsed_labels, set_name
from softpref.study.results import code_version
from softpref.study.scorers import SCORERS
from softpref.study.targets import TARGETS

USUAL = ("informative", "recommended")
"""What goes without saying in the names of results."""
SEEDS = (0, 1, 2)  # as many as the paper has
SFT_DATA = ("disjoint", "clean_chosen", "noisy_chosen")


@dataclass
class StudyOptions:
    """Options of `softpref study TARGET`."""

    preset: Literal["world", "tiny", "paper", "real"] = option(
        "`world`: the synthetic language; `tiny`: a small model and files of your own; `paper`: "
        "the paper's models and data, from a hub; `real`: any chat model and files of pairs whose "
        "right labels are known, a table of its own, without TARGET.",
        "world",
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
    scorers: list[str] | None = option(
        "audit, audit_difficulty: ways to tell wrong labels; default: all. `confident_learning` "
        "needs cleanlab, which softpref[cleanlab] installs."
    )
    judge: str | None = option(
        "YAML file with a judge's options, as of `softpref judge`, which then gives every win "
        "rate; `none`: no one. Default: the checker in the world, no one in `tiny`, and gpt-4-0613 "
        "in one drawn order in `paper`, as there."
    )
    judge_key: str | None = option(
        "NAME=ADDRESS for --judge: the environment variable whose value is sent, and where "
        "to, as the file's base_url has it."
    )
    jobs: int = option("Worker processes, one thread each; default: one a processor.")
    model: str | None = option(
        "tiny: the SFT model; paper: llama-2-7b or phi-2; real: a directory or hub id."
    )
    data: str | None = option("paper: hh (Golden HH) or oasst1.")
    dry_run: bool = option("paper, real: say what the grid would take, and run nothing.", False)
    train: str | None = option("tiny: training pairs.")
    clean: str | None = option("tiny: trusted pairs.")
    test: str | None = option("tiny: pairs to measure on.")
    pairs: list[str] | None = option(
        "real: files of pairs, each a set by itself: right labels, or response_1, response_2, gold "
        "and judges."
    )
    labels: list[str] | None = option(
        "real: where training labels come from: `flips:RATE`, or `judge:NAME`, the verdicts in the "
        "column judges; default flips:0 flips:0.2 flips:0.4."
    )
    trusted_pairs: int | None = option("real: rightly labelled pairs of a cell; default 140.")
    train_pairs: int | None = option("real: most training pairs of a cell; default 400.")
    test_pairs: int | None = option("real: held-out pairs of a cell; default 200.")
    longest: int | None = option(
        "real: leave out pairs of more characters, prompt and both responses; default 700."
    )
    learning_rate: float | None = option("real: peak learning rate of the adapter; default 2e-4.")
    epochs: float | None = option("real: passes over the training pairs; default 1.")
    bf16: bool | None = option("real: run in bfloat16, on a CPU too; default: float32.")
    output: str = option("Directory of the study; an interrupted study resumes there.", "")


def asked_cells(target: Target, options: StudyOptions) -> list[Cell]:
    """Return the cells of a target's grid that the options ask for."""
    if target is REAL:
        return target.cells(
            options.seeds or SEEDS,
            method=options.methods,
            pairs=[set_name(path) for path in options.pairs or ()],
            labels=[parsed_labels(labels) for labels in options.labels or ()],
        )
    sft_data = options.sft_data
    if not sft_data and options.recipe == "faithful" and "sft_data" not in target.axes:
        sft_data = ["clean_chosen"]  # as the paper does
    return target.cells(
        options.seeds or SEEDS, method=options.methods, noise_rate=options.noise,
        recipe=[options.recipe], sft_data=sft_data, scorer=options.scorers,
    )  # fmt: skip


def checked(name: str, options: StudyOptions) -> tuple[Target, Preset, Path]:
    """Return target, preset and output directory; nothing is written.

    Raises:
        UsageError: an option is missing, unknown or at odds with another.
    """
    if options.preset != "real" and name not in TARGETS:
        raise UsageError(
            f"no target {name!r}: name one first, softpref study TARGET; there are "
            f"{', '.join(TARGETS)}."
        )
    if not options.dry_run:
        require(options.output, "--output")
        directory_to_write(options.output)
    _refuse_unknown("methods", options.methods, METHODS)
    _refuse_unknown("sft_data", options.sft_data, SFT_DATA)
    for rate in options.noise or ():
        if not 0 <= rate < 1:
            raise UsageError(f"--noise {rate}: give shares of pairs in [0, 1).")
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: must be at least 1.")
    if options.dry_run and options.preset not in ("paper", "real"):
        raise UsageError("--dry_run is for --preset paper and real: the others can just be run.")
    _refuse_others_files(options)
    if options.preset == "real":
        return REAL, _on_real(name, options), Path(options.output)
    target, output = TARGETS[name], Path(options.output)
    _check_scorers(name, target, options.scorers)
    if options.judge and not target.compares_answers:
        raise UsageError(f"--judge: {name} measures labels, not answers; leave it out.")
    judge = _judge(options) if target.compares_answers else None
    if options.preset != "world":
        if target.needs_two_sizes:
            raise UsageError(
                f"{name} needs the world, which has models of two sizes: leave --preset out, or "
                "run table1 with the other model."
            )
        if target.needs_win_rates and not judge:
            raise UsageError(f"{name} needs win rates: name who judges by --judge FILE.yaml.")
    preset = _preset(options, output, judge)
    if judge and judge.judge == "endpoint" and not options.dry_run:
        make_judge(judge)  # a missing key is better known now than after the first run
    return target, preset, output


def _judge(options: StudyOptions) -> JudgeOptions | None:
    """Return who judges; None where no one does, or the world's own checker."""
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
    asked = scorers or target.axes["scorer"]
    if "confident_learning" in asked:
        others = " ".join(other for other in asked if other != "confident_learning")
        require_package("cleanlab", "cleanlab", "--scorers confident_learning",
                        f", or name the others, --scorers {others}")  # fmt: skip


FILES = {
    "tiny": ("model", "train", "clean", "test"),
    "paper": ("model", "data"),
    "world": (),
    "real": ("model", "pairs"),
}
SIZES = {"trusted_pairs": 140, "train_pairs": 400, "test_pairs": 200, "longest": 700}
"""Options of `real` with what they are unless given; learning rate and epochs were tried with a
model of 135 million parameters on seeds 1000 and up."""
TRAINING = {"learning_rate": 2e-4, "epochs": 1.0, "bf16": False}
ONLY_REAL = ("labels", *SIZES, *TRAINING)
NOT_REAL = {"noise": "--labels", "sft_data": "", "scorers": "", "judge": "--labels judge:NAME"}


def _refuse_others_files(options: StudyOptions) -> None:
    own = FILES[options.preset]
    for flag in own:
        require(getattr(options, flag), f"--{flag}")
    optional = ONLY_REAL if options.preset == "real" else ()
    for flag in {flag: None for flags in (*FILES.values(), ONLY_REAL) for flag in flags}:
        if flag not in (*own, *optional) and getattr(options, flag) is not None:
            raise UsageError(f"--{flag} is not read by --preset {options.preset}: leave it out.")


def _preset(options: StudyOptions, output: Path, judge: JudgeOptions | None) -> Preset:
    made_by = output / "worlds" / code_version()
    if options.preset == "tiny":
        return OnFiles(**{flag: getattr(options, flag) for flag in FILES["tiny"]}, judge=judge)
    if options.preset == "paper":
        _refuse_unknown("model", [str(options.model)], MODELS)
        _refuse_unknown("data", [str(options.data)], DATA)
        return OnPaper(str(options.model), str(options.data), made_by, judge)
    return InWorld(options.signal, made_by, judge)


def _on_real(name: str, options: StudyOptions) -> OnReal:
    """Return the preset of real pairs, its options checked."""
    if name:
        raise UsageError(f"--preset real has a table of its own: leave {name} out.")
    for flag, instead in NOT_REAL.items():
        if getattr(options, flag):
            remedy = f"give {instead} instead" if instead else "leave it out"
            raise UsageError(f"--{flag} is not read by --preset real: {remedy}.")
    if options.signal != "informative" or options.recipe != "recommended":
        raise UsageError("--preset real reads neither --signal nor --recipe: leave them out.")
    sizes = {flag: _or(getattr(options, flag), default) for flag, default in SIZES.items()}
    for flag, size in sizes.items():
        if size < 1:
            raise UsageError(f"--{flag} {size}: must be at least 1.")
    given = {flag: _or(getattr(options, flag), default) for flag, default in TRAINING.items()}
    for flag in ("learning_rate", "epochs"):
        if not given[flag] > 0:
            raise UsageError(f"--{flag} {given[flag]}: must be above 0.")
    training = {("num_train_epochs" if k == "epochs" else k): v for k, v in given.items()}
    files: dict[str, str] = {}
    for path in options.pairs or ():
        if files.setdefault(set_name(path), path) != path:
            raise UsageError(f"--pairs {path}: is the same as {files[set_name(path)]}: give one.")
    of = json.dumps([code_version(), options.model, sizes, training])
    home = Path(options.output) / "splits" / hashlib.sha256(of.encode()).hexdigest()[:16]
    return OnReal(str(options.model), files, Sizes(*sizes.values()), training, home)


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given


def _refuse_unknown(flag: str, given: Sequence[str] | None, known: Collection[str]) -> None:
    for value in given or ():
        if value not in known:
            raise UsageError(f"--{flag} {value}: choose from {', '.join(known)}.")
