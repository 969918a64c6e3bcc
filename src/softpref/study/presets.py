"""Where a study's runs take place: the synthetic world, or a model and files of the user's own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from softpref.algorithm.methods import METHODS
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
from softpref.study.referees import ByChecker, ByJudge, Drawing, Referee, contests, distinct_prompts
from softpref.study.results import code_version
from softpref.study.scorers import Case, judge_by
from softpref.training.align import RUN_RECORD, AlignFiles, align
from softpref.training.config import MSPOConfig
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


class Preset(Protocol):
    """Prepares what the runs of a seed share, and runs a cell; sent to worker processes whole."""

    @property
    def judge(self) -> JudgeOptions | None:
        """Who says win rates, instead of the world's checker or of no one."""

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
    judge: JudgeOptions | None = None

    @property
    def version(self) -> dict[str, Any]:
        """The world follows from code and signal."""
        return {"preset": "world", "signal": self.signal} | judge_version(self.judge)

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

        def options(method: str) -> dict[str, Any]:
            return for_recipe(cell, alignment(method, cell.seed))

        files = cell_files(cell, sources, world.pairs("eval"), directory, options(cell.method))
        referee: Referee
        if self.judge:
            prompts = [Prompt(text, row=row) for row, text in enumerate(world.test()[0], start=1)]
            drawing = Drawing("the world's test prompts", prompts, cell.seed, 1.0, MAX_NEW_TOKENS)
            referee = ByJudge(self.judge, drawing, files.model, directory)
        else:
            same = files.model == world.sft
            referee = ByChecker(Checker(world, None if same else Path(files.model)))
        return align_and_measure(cell, files, options, referee)


@dataclass(frozen=True)
class OnFiles:
    """A model and pairs of the user's own; without a checker, measured by held-out pairs."""

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

    def shared(self, cell: Cell) -> tuple[()]:
        """Nothing."""
        return ()

    def prepare(self, *shared: Any) -> None:
        """Do nothing."""

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Flip labels, align, measure on the test pairs."""
        size = cell.clean_pairs or len(load_pairs(self.clean).pairs)
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
        return align_and_measure(cell, files, options, judging(self.judge, cell, files, directory))


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


def judge_version(judge: JudgeOptions | None) -> dict[str, Any]:
    """Return what results by a judge must agree in besides."""
    if judge is None:
        return {}
    return {"judge": verdict_options(judge), "judging": code_version(["judging"])}


def judging(
    judge: JudgeOptions | None, cell: Cell, files: AlignFiles, directory: Path
) -> Referee | None:
    """Return the judge as a referee of greedy responses to the test pairs' prompts."""
    if judge is None:
        return None
    test = str(files.eval)
    drawing = Drawing(test, distinct_prompts(test), cell.seed, temperature=0.0)
    return ByJudge(judge, drawing, files.model, directory)


def align_and_measure(
    cell: Cell, files: AlignFiles, options: Callable[[str], dict[str, Any]], referee: Referee | None
) -> dict[str, float]:
    """Align, and measure by the referee and by what any files allow.

    A cell that names a scorer measures that instead.

    Args:
        cell: what is asked for.
        files: made for it.
        options: the preset's alignment options of a method.
        referee: who compares answers; without one there is no win rate.
    """
    if cell.scorer:
        return _judge_labels(cell, files, options)

    def run(of: Cell, where: AlignFiles) -> None:
        align(where, _config(of, options(of.method)))

    compared = contests(cell, files, referee, run) if referee else []
    run(cell, files)
    output = Path(files.output)
    record = json.loads((output / RUN_RECORD).read_text(encoding="utf-8"))
    numbers = noise_rate_estimate(record)
    everywhere: list[Evaluator] = [
        HeldOutPairs(str(files.eval)),
        CleanLoss(str(files.clean), files.model),
    ]
    if "clean" in METHODS[cell.method].needs:
        everywhere.append(LabelQuality(str(files.train)))
    for evaluate in (*compared, *everywhere):
        numbers |= evaluate(output)
    drop_weights(output)
    return numbers


def _judge_labels(
    cell: Cell, files: AlignFiles, options: Callable[[str], dict[str, Any]]
) -> dict[str, float]:
    """Measure the cell's way to tell wrong labels."""
    assert cell.scorer

    def config(method: str) -> MSPOConfig:
        mode = "official" if method == "perpcorrect" else None
        of_method = dataclasses.replace(cell, method=method, perpcorrect_mode=mode)
        return _config(of_method, options(method))

    numbers = judge_by(cell.scorer, Case(files, config))
    drop_weights(Path(files.output))
    return numbers


def drop_weights(run: Path) -> None:
    """Keep records and labels: a grid's models would fill the disk; run.json can repeat them."""
    for weights in run.glob("*.safetensors"):
        if weights.name != META_LEARNER:
            weights.unlink()
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    shutil.rmtree(run.parent / "sft", ignore_errors=True)
