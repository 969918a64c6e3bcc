"""Where a study's runs take place: the synthetic world, or a model and files of the user's own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from softpref.algorithm.methods import METHODS
from softpref.data.noise import inject
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.evaluation.evaluator import Evaluator, HeldOutPairs, LabelQuality
from softpref.study.grid import Cell
from softpref.training.align import RUN_RECORD, AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.difficulty import inject_by_difficulty
from softpref.training.models import load_policy
from softpref.training.output import write_lines
from softpref.training.reference import fingerprint_weights
from softpref.training.teacher import META_LEARNER
from softpref.world.build import WORLDS
from softpref.world.checker import Checker
from softpref.world.prepare import PreparedWorld, alignment, prepare_world

LARGEST_CLEAN_SET = 200
SMALL_MODEL_LR = 1e-4
HARD_SHARE, EASY_SHARE = 1.6, 0.4


class Preset(Protocol):
    """Prepares what the runs of a seed share, and runs a cell; sent to worker processes whole."""

    @property
    def version(self) -> dict[str, Any]:
        """What results must agree in besides code."""

    def prepare(self, seed: int) -> None:
        """Make what all cells of a seed share."""

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

    def prepare(self, seed: int) -> None:
        """Fit the seed's SFT model and make its pairs."""
        self._world(seed)

    def _world(self, seed: int) -> PreparedWorld:
        # The first of them are the same whatever the target, the last 50 are for Figure 5 alone.
        world = dataclasses.replace(WORLDS[self.signal], clean_pairs=LARGEST_CLEAN_SET)
        return prepare_world(world, seed, self.home / f"{self.signal}-seed{seed}")

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Flip labels, align, let the checker compare drawn answers."""
        world = self._world(cell.seed)
        size = cell.clean_pairs or WORLDS[self.signal].clean_pairs
        sources = Sources(world.sft, world.pairs("train"), world.pairs("clean"), size)
        files = _noisy_files(cell, sources, world.pairs("eval"), directory)
        options = alignment(cell.method, cell.seed)
        return _align_and_measure(cell, files, options, [Checker(world)])


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

    def prepare(self, seed: int) -> None:
        """Nothing is shared."""

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Flip labels, align, measure on the test pairs."""
        size = cell.clean_pairs or len(load_pairs(self.clean).pairs)
        sources = Sources(self.model, self.train, self.clean, size)
        files = _noisy_files(cell, sources, self.test, directory)
        options = {
            "method": cell.method,
            "tuning": "full",
            "learning_rate": SMALL_MODEL_LR,
            "seed": cell.seed,
            "logging_strategy": "no",
            "save_strategy": "no",
        }
        return _align_and_measure(cell, files, options, [])


@dataclass(frozen=True)
class Sources:
    """What a cell's files are made from: SFT model, right training and clean pairs, how many."""

    sft: str
    train: str
    clean: str
    clean_pairs: int


def _noisy_files(cell: Cell, sources: Sources, test: str, directory: Path) -> AlignFiles:
    """Write the cell's training and clean pairs, and return all that its run reads and writes."""
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
    return AlignFiles(sources.sft, noisy, clean, test, str(directory / "run"))


def _options(cell: Cell, options: dict[str, Any]) -> MSPOConfig:
    known: dict[str, Any] = (
        {"noise_rate": cell.noise_rate} if cell.noise_rate_source == "given" else {}
    )
    recipe = options
    if cell.recipe == "faithful":
        own = ("learning_rate", "beta", "tuning", "gradient_accumulation_steps",
               "per_device_train_batch_size")  # fmt: skip
        recipe = {name: value for name, value in options.items() if name not in own}
        recipe |= {"recipe": "faithful"}
    return MSPOConfig(disable_tqdm=True, **recipe, **known)


def _align_and_measure(
    cell: Cell, files: AlignFiles, options: dict[str, Any], evaluators: Sequence[Evaluator]
) -> dict[str, float]:
    """Align, and measure by the preset's evaluators and by those that any files allow."""
    align(files, _options(cell, options))
    run = Path(files.output)
    record = json.loads((run / RUN_RECORD).read_text(encoding="utf-8"))
    noise = record["noise_rate"]
    numbers = {"noise_rate_estimate": noise["rate"]} if noise else {}
    about_labels = [LabelQuality(files.train)] if "clean" in METHODS[cell.method].needs else []
    for evaluate in (*evaluators, HeldOutPairs(str(files.eval)), *about_labels):
        numbers |= evaluate(run)
    for weights in run.glob("*.safetensors"):
        if weights.name != META_LEARNER:
            weights.unlink()  # a grid's models would fill the disk; run.json says how to repeat it
    return numbers
