"""Presets of a study: the synthetic world, or a user's own model and files."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from softpref.algorithm.methods import METHODS
from softpref.data.label_columns import labelled
from softpref.data.noise import inject
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.judging.options import JudgeOptions, verdict_options
from softpref.judging.responses import Prompt
from softpref.models.difficulty import inject_by_difficulty
from softpref.models.loading import load_policy
from softpref.models.reference import fingerprint_weights
from softpref.study.evaluators import CleanLoss, Evaluator, HeldOutPairs, LabelQuality
from softpref.study.grid import Cell
from softpref.study.readings import noise_rate_estimate
from softpref.study.referees import (
    JudgeReferee,
    Referee,
    ResponseSampling,
    distinct_prompts,
    referee_evaluators,
)
from softpref.study.results import code_version
from softpref.study.scorers import NoisySet, measure_scorer
from softpref.training.align import AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.finished import read_record
from softpref.training.output import write_lines
from softpref.training.sft import SFTFiles, SFTOptions, fine_tune_files
from softpref.training.teacher import META_LEARNER
from softpref.world.build import MAX_NEW_TOKENS, WORLDS
from softpref.world.checker import Checker
from softpref.world.prepare import PreparedWorld, alignment, prepare_world

LARGEST_CLEAN_SET = 200
SMALL_MODEL_LR = 1e-4
HARD_SHARE, EASY_SHARE = 1.6, 0.4
HIDDEN_SIZE = {"usual": 96, "small": 64}
_BATCH_OPTION = "per_device_train_batch_size"
_STRATEGIES = ("logging_strategy", "save_strategy")
_SFT_OPTIONS = ("learning_rate", _BATCH_OPTION, "seed", "bf16", "use_cpu", *_STRATEGIES)
_RECIPE_OPTIONS = ("learning_rate", _BATCH_OPTION, "beta", "tuning", "gradient_accumulation_steps")


class Preset(Protocol):
    """Prepares what cells share, and runs a cell; worker processes get a pickled copy."""

    @property
    def judge(self) -> JudgeOptions | None:
        """The judge of win rates; None for the world's checker or no win rates."""

    @property
    def version(self) -> dict[str, Any]:
        """Everything but code that results in one file must have in common."""

    def shared_key(self, cell: Cell) -> tuple[Any, ...]:
        """Return the key of what the cell shares with others."""

    def prepare(self, *shared: Any) -> None:
        """Make what cells with this key share, once, before the first of them runs."""

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Run a cell in a new directory and return its numbers."""


@dataclass(frozen=True)
class WorldPreset:
    """The synthetic world, with an SFT model, pairs and a checker for every seed."""

    signal: str
    home: Path
    judge: JudgeOptions | None = None

    @property
    def version(self) -> dict[str, Any]:
        """The signal, since code and signal define the world."""
        return {"preset": "world", "signal": self.signal} | judge_version(self.judge)

    def shared_key(self, cell: Cell) -> tuple[int, str]:
        """Return seed and model size, which define a world."""
        return cell.seed, cell.model_size

    def prepare(self, *shared: Any) -> None:
        """Train the SFT model and make its pairs."""
        self._world(*shared)

    def _world(self, seed: int, model_size: str) -> PreparedWorld:
        # All targets share the first 150 clean pairs; only Figure 5 uses the last 50.
        world = dataclasses.replace(
            WORLDS[self.signal], clean_pairs=LARGEST_CLEAN_SET, hidden_size=HIDDEN_SIZE[model_size]
        )
        return prepare_world(world, seed, self.home / f"{self.signal}-{model_size}-seed{seed}")

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Flip labels, align, and compare sampled answers."""
        world = self._world(cell.seed, cell.model_size)
        size = cell.clean_pairs or WORLDS[self.signal].clean_pairs
        sources = Sources(world.sft, world.pairs("train"), world.pairs("clean"), size)

        def options(method: str) -> dict[str, Any]:
            return for_recipe(cell, alignment(method, cell.seed))

        files = cell_files(cell, sources, world.pairs("eval"), directory, options(cell.method))
        referee: Referee
        if self.judge:
            prompts = [Prompt(text, row=row) for row, text in enumerate(world.test()[0], start=1)]
            sampling = ResponseSampling(
                "the world's test prompts", prompts, cell.seed, 1.0, MAX_NEW_TOKENS
            )
            referee = JudgeReferee(self.judge, sampling, files.model, directory)
        else:
            start = None if files.model == world.sft else Path(files.model)
            referee = Checker(world, start)
        return align_and_measure(cell, files, options, referee)


@dataclass(frozen=True)
class FilesPreset:
    """A user's own model and pairs; without a judge, measured by held-out pairs."""

    model: str
    train: str
    clean: str
    test: str
    judge: JudgeOptions | None = None

    @property
    def version(self) -> dict[str, Any]:
        """Fingerprints of the model's weights and of the files."""
        policy = load_policy(self.model, trust_remote_code=False)
        files = {name: load_pairs(getattr(self, name)) for name in ("train", "clean", "test")}
        return {
            "preset": "tiny",
            "model": fingerprint_weights(policy),
            **{name: loaded.fingerprint for name, loaded in files.items()},
            **judge_version(self.judge),
        }

    def shared_key(self, cell: Cell) -> tuple[()]:
        """Return an empty key: cells share nothing."""
        return ()

    def prepare(self, *shared: Any) -> None:
        """Do nothing."""

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Flip labels, align and measure on the test pairs."""
        size = cell.clean_pairs or len(labelled(load_pairs(self.clean).pairs))
        sources = Sources(self.model, self.train, self.clean, size)

        def options(method: str) -> dict[str, Any]:
            own = {
                "method": method,
                "tuning": "full",
                "learning_rate": SMALL_MODEL_LR,
                "seed": cell.seed,
                "logging_strategy": "no",
                "save_strategy": "no",
            }
            return for_recipe(cell, own)

        files = cell_files(cell, sources, self.test, directory, options(cell.method))
        return align_and_measure(
            cell, files, options, judge_referee(self.judge, cell, files, directory)
        )


@dataclass(frozen=True)
class Sources:
    """Sources of a cell's files: SFT model, correctly labelled pairs, number of clean pairs."""

    sft: str
    train: str
    clean: str
    clean_pairs: int


def cell_files(
    cell: Cell, sources: Sources, test: str, directory: Path, own: dict[str, Any]
) -> AlignFiles:
    """Write the cell's pairs, and its SFT model if it has its own; return all paths.

    Args:
        cell: the cell.
        sources: sources of the files.
        test: pairs to evaluate on.
        directory: the cell's new directory.
        own: the preset's alignment options; SFT uses learning rate and batch size.
    """
    directory.mkdir(parents=True)
    noisy, clean, chosen = (
        str(directory / f"{name}.jsonl") for name in ("noisy", "clean", "before_flips")
    )
    if cell.noise_kind == "difficulty":
        hard, easy = HARD_SHARE * cell.noise_rate, EASY_SHARE * cell.noise_rate
        files = sources.train, noisy, sources.sft
        inject_by_difficulty(*files, cell.seed, hard_rate=hard, easy_rate=easy)
    else:
        inject(sources.train, noisy, cell.noise_rate, cell.seed)
    rows = labelled(load_pairs(sources.clean).pairs)
    if len(rows) < sources.clean_pairs:
        raise UsageError(
            f"{sources.clean} has {len(rows)} pairs, but the target needs {sources.clean_pairs}: "
            "add more."
        )
    write_lines(Path(chosen), rows.select(range(sources.clean_pairs)))
    inject(chosen, clean, cell.clean_noise_rate, cell.seed)
    start = sources.sft
    if cell.sft_data != "disjoint":
        start = str(directory / "sft")
        seen = {"clean_chosen": sources.train, "noisy_chosen": noisy}[cell.sft_data]
        _second_sft(SFTFiles(model=sources.sft, train=seen, output=start), own)
    return AlignFiles(start, noisy, clean, test, str(directory / "run"))


def _second_sft(files: SFTFiles, own: dict[str, Any]) -> None:
    """Fine-tune the SFT model for one more epoch."""
    config = {name: own[name] for name in _SFT_OPTIONS if name in own}
    fine_tune_files(files, SFTOptions(disable_tqdm=True, **config))


def for_recipe(cell: Cell, options: dict[str, Any]) -> dict[str, Any]:
    """Return a preset's options without those that the faithful recipe sets itself."""
    if cell.recipe == "recommended":
        return options
    return {name: value for name, value in options.items() if name not in _RECIPE_OPTIONS}


def _config(cell: Cell, options: dict[str, Any]) -> MSPOConfig:
    asked: dict[str, Any] = {"recipe": cell.recipe}
    if cell.noise_rate_source == "given":
        asked["noise_rate"] = cell.noise_rate
    if cell.perpcorrect_mode:
        asked["perpcorrect_mode"] = cell.perpcorrect_mode
    if cell.measure_every:
        asked |= {"save_strategy": "steps", "save_steps": cell.measure_every}
    return MSPOConfig(disable_tqdm=True, **options | asked)


def judge_version(judge: JudgeOptions | None) -> dict[str, Any]:
    """Return what results of one judge must have in common."""
    if judge is None:
        return {}
    return {"judge": verdict_options(judge), "judging": code_version(["judging"])}


def judge_referee(
    judge: JudgeOptions | None, cell: Cell, files: AlignFiles, directory: Path
) -> Referee | None:
    """Return a referee that judges greedy responses to the prompts of the test pairs."""
    if judge is None:
        return None
    test = str(files.eval)
    sampling = ResponseSampling(test, distinct_prompts(test), cell.seed, temperature=0.0)
    return JudgeReferee(judge, sampling, files.model, directory)


def align_and_measure(
    cell: Cell, files: AlignFiles, options: Callable[[str], dict[str, Any]], referee: Referee | None
) -> dict[str, float]:
    """Align and measure a cell, or measure its scorer if it names one.

    Args:
        cell: the cell.
        files: its files.
        options: returns the preset's alignment options of a method.
        referee: compares answers; None for no win rates.
    """
    if cell.scorer:
        return _measure_labels(cell, files, options)

    def run(cell: Cell, files: AlignFiles) -> None:
        align(files, _config(cell, options(cell.method)))

    contests = referee_evaluators(cell, files, referee, run) if referee else []
    run(cell, files)
    output = Path(files.output)
    numbers = noise_rate_estimate(read_record(output))
    held_out, clean_loss = HeldOutPairs(str(files.eval)), CleanLoss(str(files.clean), files.model)
    evaluators: list[Evaluator] = [held_out, clean_loss]
    if "clean" in METHODS[cell.method].needs:
        evaluators.append(LabelQuality(str(files.train)))
    for evaluate in (*contests, *evaluators):
        numbers |= evaluate(output)
    drop_weights(output)
    return numbers


def _measure_labels(
    cell: Cell, files: AlignFiles, options: Callable[[str], dict[str, Any]]
) -> dict[str, float]:
    """Measure the cell's method of finding wrong labels."""
    assert cell.scorer

    def config(method: str) -> MSPOConfig:
        mode = "official" if method == "perpcorrect" else None
        method_cell = dataclasses.replace(cell, method=method, perpcorrect_mode=mode)
        return _config(method_cell, options(method))

    numbers = measure_scorer(cell.scorer, NoisySet(files, config))
    drop_weights(Path(files.output))
    return numbers


def drop_weights(run: Path) -> None:
    """Delete model weights, which would fill the disk; run.json can reproduce them."""
    for weights in run.glob("*.safetensors"):
        if weights.name != META_LEARNER:
            weights.unlink()
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    shutil.rmtree(run.parent / "sft", ignore_errors=True)
