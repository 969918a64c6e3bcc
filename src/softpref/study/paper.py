"""The paper's own setting: its models and data by hub id, and the cost of running it.

Win rates come from a judge, by default the paper's. Without one a run is measured by held-out
preference accuracy only.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

from softpref.algorithm.methods import METHODS
from softpref.data.fingerprints import SFT_TARGETS
from softpref.data.readers import read_rows
from softpref.judging.options import JudgeOptions
from softpref.study.grid import Cell
from softpref.study.presets import (
    Sources,
    align_and_measure,
    cell_files,
    judge_referee,
    judge_version,
)
from softpref.training.config import MSPOConfig, recipe
from softpref.training.output import write_lines
from softpref.training.recipes import teaching_share
from softpref.training.sft import SFTFiles, SFTOptions, fine_tune_files

logger = logging.getLogger(__name__)

PAPER_JUDGE = JudgeOptions(judge_model="gpt-4-0613", structured_output="words", orders="one")
"""Appendix C: one random order. The model is too old for structured output."""
CLEAN_PAIRS = 150
TEST_PROMPTS = 1000
TRAIN_PAIRS, PAIR_TOKENS = 80_000, 400
"""For the estimate: pairs of Golden HH (Appendix C), and tokens per pair (an assumption)."""
PEAK_FLOPS, UTILISATION = 312e12, 0.4
"""Peak of an A100 in bfloat16, and the share of it that training is assumed to reach."""

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
_Row = dict[str, str]


def single_turn(row: _Row) -> _Row | None:
    """Return an HH row as a pair; None if it is not one question and one answer.

    As in PerpCorrect, both texts have one "Human:" and one "Assistant:", which are removed.
    """
    texts = row["chosen"], row["rejected"]
    if any(text.count("Human:") != 1 or text.count("Assistant:") != 1 for text in texts):
        return None
    prompt, mark, chosen = row["chosen"].partition(ASSISTANT)
    if not mark or not row["rejected"].startswith(prompt + mark):
        return None
    rejected = row["rejected"].removeprefix(prompt + mark)
    return {"prompt": prompt.removeprefix(HUMAN), "chosen": chosen, "rejected": rejected}


def without_prompter(row: _Row) -> _Row:
    """Return an OASST1 row as a pair without its first "prompter: ", as in PerpCorrect."""
    return {
        "prompt": row["prompt"].removeprefix("prompter: "),
        "chosen": row["chosen"],
        "rejected": row["rejected"],
    }


@dataclass(frozen=True)
class PaperData:
    """A data set of the paper: hub id, split of test prompts, conversion of rows to pairs."""

    hub_id: str
    test_split: str
    to_pair: Callable[[_Row], _Row | None]

    def pairs(self, split: str) -> list[_Row]:
        """Load a split without pairs that have a text of at most one character."""
        rows = read_rows(f"{self.hub_id}:{split}")
        pairs = (self.to_pair(cast(_Row, row)) for _, row in rows)
        return [pair for pair in pairs if pair and min(map(len, pair.values())) > 1]


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper: hub id, parameters, and the learning rate of Table 5."""

    hub_id: str
    parameters: float
    learning_rate: float


DATA = {
    "hh": PaperData("Unified-Language-Model-Alignment/Anthropic_HH_Golden", "test", single_turn),
    "oasst1": PaperData("tasksource/oasst1_pairwise_rlhf_reward", "validation", without_prompter),
}
MODELS = {
    "llama-2-7b": PaperModel("meta-llama/Llama-2-7b-chat-hf", 6.74e9, 5e-7),
    "phi-2": PaperModel("microsoft/phi-2", 2.78e9, 1e-6),
}


@dataclass(frozen=True)
class PaperPreset:
    """A model and a data set of the paper, one epoch, the clean set held out of training."""

    model: str
    data: str
    home: Path
    judge: JudgeOptions | None = None

    @property
    def version(self) -> dict[str, Any]:
        """The hub ids and the judge."""
        return {
            "preset": "paper",
            "model": MODELS[self.model].hub_id,
            "data": DATA[self.data].hub_id,
            **judge_version(self.judge),
        }

    def shared_key(self, cell: Cell) -> tuple[int, str]:
        """Return seed and SFT data, which fix the files and the SFT model."""
        return cell.seed, cell.sft_data

    def prepare(self, *shared: Any) -> None:
        """Draw clean pairs and test pairs, and train the SFT model for one epoch.

        SFT trains on the truly better responses: of half of the pairs, with alignment on the other
        half ("disjoint"), or, as in the paper, of the pairs for alignment. SFT on noisy responses
        is part of each cell.
        """
        seed, sft_data = shared
        home = self._home(seed, sft_data)
        if (home / "sft" / SFT_TARGETS).is_file():
            return
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        data, random = DATA[self.data], Random(seed)
        pairs, tests = data.pairs("train"), data.pairs(data.test_split)
        random.shuffle(pairs)
        random.shuffle(tests)
        clean, rest = pairs[:CLEAN_PAIRS], pairs[CLEAN_PAIRS:]
        sft, train = rest, rest
        if sft_data == "disjoint":
            sft, train = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        test = list({pair["prompt"]: pair for pair in tests}.values())[:TEST_PROMPTS]
        files = {"clean": clean, "train": train, "sft": sft, "test": test}
        for name, rows in files.items():
            write_lines(home / f"{name}.jsonl", rows)
        if sft_data == "noisy_chosen":
            return
        fine_tune_files(
            SFTFiles(MODELS[self.model].hub_id, str(home / "sft.jsonl"), str(home / "sft")),
            SFTOptions(seed=seed, bf16=True, save_strategy="no"),
        )

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Flip labels, align and measure on the test pairs."""
        home = self._home(cell.seed, cell.sft_data)
        has_sft = cell.sft_data != "noisy_chosen"
        start = str(home / "sft") if has_sft else MODELS[self.model].hub_id
        train, clean = str(home / "train.jsonl"), str(home / "clean.jsonl")
        sources = Sources(start, train, clean, cell.clean_pairs or CLEAN_PAIRS)

        def options(method: str) -> dict[str, Any]:
            own = {"method": method, "seed": cell.seed, "bf16": True, "save_strategy": "no"}
            if cell.recipe == "faithful":
                own["learning_rate"] = MODELS[self.model].learning_rate
            return own

        without_sft = dataclasses.replace(cell, sft_data="disjoint") if has_sft else cell
        sft_options = options(cell.method)
        sft_options.pop("learning_rate", None)  # of the alignment, not of SFT
        files = cell_files(without_sft, sources, str(home / "test.jsonl"), directory, sft_options)
        referee = judge_referee(self.judge, cell, files, directory)
        return align_and_measure(cell, files, options, referee)

    def _home(self, seed: int, sft_data: str) -> Path:
        return self.home / f"{self.model}-{self.data}-{sft_data}-seed{seed}"


def estimate(model: str, cells: Sequence[Cell], judge: JudgeOptions | None = None) -> str:
    """Return the cost of a grid as a sentence: runs, A100 hours, memory.

    A forward pass takes F = 2 · parameters · tokens operations. SFT takes 3F on half of the tokens;
    reference and labels 2F; alignment 3F with all weights or 2F with LoRA, times (1 + m) for a
    method with a meta-learner (`teaching_share`). Full fine-tuning in float32 with AdamW needs 16
    bytes per parameter.
    """
    parameters = MODELS[model].parameters
    forward = 2 * parameters * TRAIN_PAIRS * PAIR_TOKENS
    total = 0.0
    for cell in cells:
        filled = recipe(cell.recipe)
        passes = 3 if filled["tuning"] == "full" else 2
        pairs = MSPOConfig.per_device_train_batch_size * filled["gradient_accumulation_steps"]
        m = teaching_share(filled["meta_batch_size"], pairs, filled["meta_every"])
        total += forward * (passes * (1 + m * METHODS[cell.method].teaches) + 2)
    preparations = len({(cell.seed, cell.sft_data) for cell in cells})
    total += preparations * 3 * forward / 2
    hours = total / (PEAK_FLOPS * UTILISATION) / 3600
    full = any(recipe(cell.recipe)["tuning"] == "full" for cell in cells)
    gib = parameters * (16 if full else 2) / 2**30
    kind = "all weights train in float32, with AdamW's moments" if full else "LoRA, base in bf16"
    return (
        f"{len(cells)} runs and {preparations} SFT runs of {MODELS[model].hub_id}: about "
        f"{hours:,.0f} A100 hours at {UTILISATION:.0%} of its peak, for {TRAIN_PAIRS:,} pairs of "
        f"{PAIR_TOKENS} tokens (the paper took 40 to 48 for one run of MSPO); {gib:,.0f} GiB for "
        f"the model ({kind}), activations not counted{_calls(cells, judge)}. Nothing was run."
    )


def _calls(cells: Sequence[Cell], judge: JudgeOptions | None) -> str:
    if judge is None or judge.judge != "endpoint":
        return ""
    contests = sum(1 + bool(cell.rival) for cell in cells if not cell.scorer)
    calls = contests * TEST_PROMPTS * (2 if judge.orders == "both" else 1)
    least = "at least " if any(cell.measure_every for cell in cells) else ""
    return f"; {least}{calls:,} calls of {judge.judge_model} as the judge" if calls else ""
