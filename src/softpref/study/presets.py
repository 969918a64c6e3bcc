"""Where a study's runs take place: the synthetic world, or a model and files of the user's own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from softpref.algorithm.methods import METHODS
from softpref.data.noise import inject
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.evaluation.evaluator import CleanLoss, Evaluator, HeldOutPairs, LabelQuality
from softpref.study.grid import Cell
from softpref.study.scorers import Case, judge
from softpref.training.align import RUN_RECORD, AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.difficulty import inject_by_difficulty
from softpref.training.models import load_policy
from softpref.training.output import write_lines
from softpref.training.reference import fingerprint_weights
from softpref.training.sft import SFTFiles, SFTOptions, fine_tune_files
from softpref.training.teacher import META_LEARNER
from softpref.world.build import WORLDS
from softpref.world.checker import Checker, compare
from softpref.world.prepare import METHOD_DRAWS, PreparedWorld, alignment, prepare_world

LARGEST_CLEAN_SET = 200
SMALL_MODEL_LR = 1e-4
HARD_SHARE, EASY_SHARE = 1.6, 0.4
HIDDEN_SIZE = {"usual": 96, "small": 64}
RIVAL_DRAWS = METHOD_DRAWS + 1_000_000


class Preset(Protocol):
    """Prepares what the runs of a seed share, and runs a cell; sent to worker processes whole."""

    @property
    def version(self) -> dict[str, Any]:
        """What results must agree in besides code."""

    def shared(self, cell: Cell) -> tuple[Any, ...]:
        """Name what the cell shares with others."""

    def prepare(self, *shared: Any) -> None:
        """Make what cells share, once, before the first of them runs."""

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Do the run in a new directory and return its numbers."""


@dataclass(frozen=True)
class InWorld:
    """The synthetic world: its own SFT model, pairs and checker for every seed."""

    signal: str
    home: Path

    @property
    def version(self) -> dict[str, Any]:
        """The world follows from code and signal."""
        return {"preset": "world", "signal": self.signal}

    def shared(self, cell: Cell) -> tuple[int, str]:
        """A world for every seed and size of model."""
        return cell.seed, cell.model_size

    def prepare(self, *shared: Any) -> None:
        """Fit the SFT model and make its pairs."""
        self._world(*shared)

    def _world(self, seed: int, model_size: str) -> PreparedWorld:
        # The first of them are the same whatever the target, the last 50 are for Figure 5 alone.
        world = dataclasses.replace(
            WORLDS[self.signal], clean_pairs=LARGEST_CLEAN_SET, hidden_size=HIDDEN_SIZE[model_size]
        )
        return prepare_world(world, seed, self.home / f"{self.signal}-{model_size}-seed{seed}")

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Flip labels, align, let the checker compare drawn answers."""
        world = self._world(cell.seed, cell.model_size)
        size = cell.clean_pairs or WORLDS[self.signal].clean_pairs
        sources = Sources(world.sft, world.pairs("train"), world.pairs("clean"), size)
        own = alignment(cell.method, cell.seed)
        files = cell_files(cell, sources, world.pairs("eval"), directory, own)
        checker = Checker(world, None if files.model == world.sft else Path(files.model))
        evaluators: list[Evaluator] = [checker]
        if cell.rival:
            evaluators.append(_head_to_head(cell, files, checker))
        if cell.measure_every:
            evaluators.append(partial(_on_the_way, checker))
        return align_and_measure(cell, files, for_recipe(cell, own), evaluators)


def _head_to_head(cell: Cell, files: AlignFiles, checker: Checker) -> Evaluator:
    """Do the rival's run on the cell's own pairs, and compare answers with it, drawn by chance."""
    assert cell.rival
    rival = dataclasses.replace(cell, method=cell.rival)
    own = dataclasses.replace(files, output=f"{files.output}-of-{cell.rival}")
    align(own, _config(rival, for_recipe(cell, alignment(cell.rival, cell.seed))))
    rival_scores = checker.scores(Path(own.output), RIVAL_DRAWS)
    shutil.rmtree(own.output)
    return lambda run: compare("rival_win_rate", checker.scores(run), rival_scores)


def _on_the_way(checker: Checker, run: Path) -> dict[str, float]:
    """Return the win rate at every checkpoint, as `win_rate_at_STEP`."""
    return {
        f"win_rate_at_{checkpoint.name.removeprefix('checkpoint-')}": numbers["win_rate"]
        for checkpoint in sorted(run.glob("checkpoint-*"))
        if "win_rate" in (numbers := checker(checkpoint))
    }


@dataclass(frozen=True)
class OnFiles:
    """A model and pairs of the user's own; without a checker, measured by held-out pairs."""

    model: str
    train: str
    clean: str
    test: str

    @property
    def version(self) -> dict[str, Any]:
        """Fingerprints of the model's weights and of the files."""
        policy = load_policy(self.model, trust_remote_code=False)
        files = {name: load_pairs(getattr(self, name)) for name in ("train", "clean", "test")}
        return {
            "preset": "tiny",
            "model": fingerprint_weights(policy),
            **{name: loaded.fingerprint for name, loaded in files.items()},
        }

    def shared(self, cell: Cell) -> tuple[()]:
        """Nothing."""
        return ()

    def prepare(self, *shared: Any) -> None:
        """Do nothing."""

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Flip labels, align, measure on the test pairs."""
        size = cell.clean_pairs or len(load_pairs(self.clean).pairs)
        sources = Sources(self.model, self.train, self.clean, size)
        own = {
            "method": cell.method,
            "tuning": "full",
            "learning_rate": SMALL_MODEL_LR,
            "seed": cell.seed,
            "logging_strategy": "no",
            "save_strategy": "no",
        }
        files = cell_files(cell, sources, self.test, directory, own)
        return align_and_measure(cell, files, for_recipe(cell, own), [])


@dataclass(frozen=True)
class Sources:
    """What a cell's files are made from: SFT model, right training and clean pairs, how many."""

    sft: str
    train: str
    clean: str
    clean_pairs: int


def cell_files(
    cell: Cell, sources: Sources, test: str, directory: Path, own: dict[str, Any]
) -> AlignFiles:
    """Write the cell's pairs, and its SFT model if SFT has seen them, and say where all lies.

    Args:
        cell: what is asked for.
        sources: what the files are made from.
        test: pairs to evaluate on.
        directory: the cell's; new.
        own: the preset's own alignment options, of which SFT takes rate and batch.
    """
    directory.mkdir(parents=True)
    noisy, clean, chosen = (
        str(directory / f"{name}.jsonl") for name in ("noisy", "clean", "before_flips")
    )
    if cell.noise_kind == "difficulty":
        inject_by_difficulty(
            sources.train, noisy, sources.sft, cell.seed,
            hard_rate=HARD_SHARE * cell.noise_rate, easy_rate=EASY_SHARE * cell.noise_rate,
        )  # fmt: skip
    else:
        inject(sources.train, noisy, cell.noise_rate, cell.seed)
    rows = load_pairs(sources.clean).pairs
    if len(rows) < sources.clean_pairs:
        raise UsageError(
            f"{sources.clean} has {len(rows)} pairs, and {sources.clean_pairs} are asked for: "
            "give more."
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
    """Fine-tune the SFT model for an epoch more."""
    same = ("learning_rate", "per_device_train_batch_size", "seed", "bf16", "logging_strategy",
            "save_strategy", "use_cpu")  # fmt: skip
    config = {name: own[name] for name in same if name in own}
    fine_tune_files(files, SFTOptions(disable_tqdm=True, **config))


def for_recipe(cell: Cell, options: dict[str, Any]) -> dict[str, Any]:
    """Return a preset's options without those that the faithful recipe sets itself."""
    if cell.recipe == "recommended":
        return options
    set_by_recipe = ("learning_rate", "beta", "tuning", "gradient_accumulation_steps",
                     "per_device_train_batch_size")  # fmt: skip
    return {name: value for name, value in options.items() if name not in set_by_recipe}


def _config(cell: Cell, options: dict[str, Any]) -> MSPOConfig:
    asked: dict[str, Any] = {"recipe": cell.recipe}
    if cell.noise_rate_source == "given":
        asked["noise_rate"] = cell.noise_rate
    if cell.perpcorrect_mode:
        asked["perpcorrect_mode"] = cell.perpcorrect_mode
    if cell.measure_every:
        asked |= {"save_strategy": "steps", "save_steps": cell.measure_every}
    return MSPOConfig(disable_tqdm=True, **options | asked)


def align_and_measure(
    cell: Cell, files: AlignFiles, options: dict[str, Any], evaluators: Sequence[Evaluator]
) -> dict[str, float]:
    """Align, and measure by the preset's evaluators and by those that any files allow.

    A cell that names a scorer measures that instead.
    """
    if cell.scorer:
        return _judge_labels(cell, files, options)
    align(files, _config(cell, options))
    run = Path(files.output)
    record = json.loads((run / RUN_RECORD).read_text(encoding="utf-8"))
    noise = record["noise_rate"]
    numbers = {"noise_rate_estimate": noise["rate"]} if noise else {}
    everywhere: list[Evaluator] = [
        HeldOutPairs(str(files.eval)),
        CleanLoss(str(files.clean), files.model),
    ]
    if "clean" in METHODS[cell.method].needs:
        everywhere.append(LabelQuality(files.train))
    for evaluate in (*evaluators, *everywhere):
        numbers |= evaluate(run)
    _drop_weights(run)
    return numbers


def _judge_labels(cell: Cell, files: AlignFiles, options: dict[str, Any]) -> dict[str, float]:
    """Measure the cell's way to tell wrong labels."""
    assert cell.scorer

    def config(method: str) -> MSPOConfig:
        mode = "official" if method == "perpcorrect" else None
        of_method = dataclasses.replace(cell, method=method, perpcorrect_mode=mode)
        return _config(of_method, options | {"method": method})

    numbers = judge(cell.scorer, Case(files, config))
    _drop_weights(Path(files.output))
    return numbers


def _drop_weights(run: Path) -> None:
    """Keep records and labels: a grid's models would fill the disk; run.json can repeat them."""
    for weights in run.glob("*.safetensors"):
        if weights.name != META_LEARNER:
            weights.unlink()
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    shutil.rmtree(run.parent / "sft", ignore_errors=True)
