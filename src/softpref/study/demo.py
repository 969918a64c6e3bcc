"""`softpref demo`: the whole story on the synthetic world, through the commands' own code."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from datasets import Dataset
from pyarrow.json import read_json
from pyarrow.parquet import read_table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softpref.data.noise import inject
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.evaluation.generate import sample
from softpref.evaluation.win_rate import win_rate
from softpref.options import option
from softpref.study.figures import draw_label_curves, draw_learned_map
from softpref.study.report import figure, page, table
from softpref.training.align import AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.metrics import auroc
from softpref.training.models import load_policy
from softpref.training.output import new_directory, write_lines, write_text
from softpref.training.sft import SFTOptions, fine_tune
from softpref.training.teacher import load_meta_learner
from softpref.world.build import (
    INFORMATIVE,
    MAX_NEW_TOKENS,
    Draw,
    make_data,
    sft_rows,
    tiny_llama,
)
from softpref.world.language import make_tokenizer, score

logger = logging.getLogger(__name__)

STAGES = 6
COMPARED = ("dpo", "mspo")
BASELINE_DRAWS, METHOD_DRAWS = 1_000_000, 2_000_000
MARK = ".softpref-demo"
HEADER = ("method", "win rate against SFT (95%)", "accuracy on clean pairs", "labels")
WIDTHS = (6, 28, 23, 6)

LEAD = (
    "A tiny language model learned to sort, reverse and shift symbols from faulty answers. It was "
    "then aligned on preference pairs of which {rate} are labelled the wrong way round: by DPO, "
    "which believes every label, and by MSPO, which learns from 150 trusted pairs how far to "
    "believe each one. Win rate: share of new prompts on which the aligned model's answer has more "
    "symbols in place than the SFT model's, ties left out. Accuracy: share of held-out, rightly "
    "labelled pairs whose right answer the policy has come to prefer."
)
HOW_TO_READ_MAP = (
    "Above, what the meta-learner makes of a pair's PPLDiff: near 1 the label is believed, near 0 "
    "it is reversed, at 0.5 the pair is left out. Below, where the right and the flipped labels "
    "lie; softpref never saw which is which. A good map is high over the right labels and low over "
    "the flipped ones. Where the two overlap no number can tell them apart, and the map is what "
    "the trusted pairs found useful there."
)
HOW_TO_READ_CURVES = (
    "The mean label that pairs were trained with, step by step. The warm start parts right and "
    "flipped labels as well as PPLDiff of the SFT model can. Where the lines go on parting, the "
    "policy's own progress makes the signal better: that is what the paper calls dynamic. Lines "
    "that run together would mean that PPLDiff says nothing about the labels."
)
END = "One seed of a small world: it shows how the method works, not how well it does on your data."


@dataclass
class DemoOptions:
    """Options of `softpref demo`."""

    output: str = option("Directory for the demo; replaced if a demo made it.", "runs/demo")
    noise_rate: float = option("Share of the training labels that are flipped.", 0.4)
    seed: int = option("Seed of world, models and flips.", 1000)


@dataclass(frozen=True)
class Outcome:
    """What one method reached; rates in 0 to 1."""

    win_rate: float | None
    win_rate_low: float
    win_rate_high: float
    preference_accuracy: float
    label_auroc: float | None = None
    label_mean_right: float | None = None
    label_mean_flipped: float | None = None

    def numbers(self) -> dict[str, float]:
        """Return what there is a number for: neither None nor the NaN of an empty mean."""
        return {k: v for k, v in asdict(self).items() if v is not None and not math.isnan(v)}


def run_demo(options: DemoOptions) -> None:
    """Make the world, fit the SFT model, flip labels, align twice, sample, and report.

    Raises:
        UsageError: the output directory holds something that no demo made.
    """
    if not 0 <= options.noise_rate < 1:
        raise UsageError(f"--noise_rate {options.noise_rate}: must be at least 0 and below 1.")
    start = time.monotonic()
    home = _fresh_directory(options.output)
    tokenizer = make_tokenizer()
    _say(1, "the synthetic world: a language with a known right answer")
    world, rows = INFORMATIVE, sft_rows(INFORMATIVE, options.seed)
    _say(2, f"SFT of a tiny Llama from scratch on {len(rows):,} faulty answers")
    sft = fine_tune_tiny(home / "sft", rows, tokenizer, options.seed)
    _say(3, f"{world.train_pairs:,} pairs, a teacher's answer over the model's own; labels flipped")
    data = make_data(world, options.seed, drawing(sft, tokenizer, options.seed))
    for name in ("train", "clean", "eval"):
        write_lines(home / f"{name}.jsonl", getattr(data, name))
    noisy = str(home / "noisy.jsonl")
    flips = inject(str(home / "train.jsonl"), noisy, options.noise_rate, options.seed)
    logger.info("  %d of %d labels flipped (%.1f%%)", flips.flipped, flips.pairs,
                100 * flips.realised_rate)  # fmt: skip
    for stage, method in enumerate(COMPARED, start=4):
        _say(stage, f"align with {method}")
        files = AlignFiles(str(home / "sft"), noisy, str(home / "clean.jsonl"),
                           str(home / "eval.jsonl"), str(home / method))  # fmt: skip
        align(files, alignment(method, options.seed))
    _say(6, f"sample answers to {len(data.test_prompts):,} new prompts and compare")
    truth = truth_of(noisy)
    # Draws of their own: with the baseline's, equal beginnings would be equal answers, hence ties.
    baseline = sampled_scores(sft, tokenizer, data.test_prompts, options.seed + BASELINE_DRAWS)
    outcomes = {}
    for method in COMPARED:
        policy = load_policy(str(home / method), trust_remote_code=False)
        scores = sampled_scores(policy, tokenizer, data.test_prompts, options.seed + METHOD_DRAWS)
        outcomes[method] = outcome_of(home / method, scores, baseline, truth)
    summary = {
        "noise_rate": options.noise_rate,
        "seconds": round(time.monotonic() - start, 1),
        "methods": {method: outcome.numbers() for method, outcome in outcomes.items()},
    }
    write_text(home / "summary.json", json.dumps(summary, indent=2) + "\n")
    _report(home, outcomes, options.noise_rate, truth)
    for row in (HEADER, *result_rows(outcomes)):
        logger.info("  ".join(cell.ljust(width) for cell, width in zip(row, WIDTHS, strict=True)))
    logger.info("%.0f seconds; open %s", summary["seconds"], home / "report.html")


def alignment(method: str, seed: int) -> MSPOConfig:
    """Return the world's alignment options: answers are short, so β and the rates are larger."""
    return MSPOConfig(
        method=cast(Any, method),
        tuning="full",
        beta=1.0,
        learning_rate=5e-4,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=250,
        gradient_accumulation_steps=1,
        max_length=64,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        use_cpu=True,
    )


def _fresh_directory(path: str) -> Path:
    home = Path(path)
    if (home / MARK).is_file():
        shutil.rmtree(home)
    home = new_directory(path, None)
    home.mkdir(parents=True, exist_ok=True)
    write_text(home / MARK, "made by softpref demo; running it again replaces this directory\n")
    return home


def fine_tune_tiny(
    directory: Path, rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, seed: int
) -> Any:
    """Fit the world's SFT model from scratch, save it, and return it."""
    config = SFTOptions(
        output_dir=str(directory),
        num_train_epochs=8,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        use_cpu=True,
    )
    model = tiny_llama(tokenizer, seed)
    fine_tune(model, tokenizer, Dataset.from_list(rows), config)
    return model


def drawing(policy: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> Draw:
    """Return a function that draws a response to each prompt, by another seed at every call."""
    calls = count(seed)

    def draw(prompts: Sequence[str]) -> list[str]:
        return sample(
            policy, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0,
            seed=next(calls), batch_size=500,
        )  # fmt: skip

    return draw


def sampled_scores(
    policy: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int
) -> list[float]:
    """Return the score of one drawn answer to each prompt, shares of symbols in place."""
    answers = drawing(policy, tokenizer, seed)(prompts)
    return [score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def truth_of(noisy: str) -> dict[str, bool]:
    """Return whether each pair of a file, by uid, is flipped."""
    pairs = load_pairs(noisy).pairs
    return dict(zip(pairs["uid"], pairs["is_flipped"], strict=True))


def outcome_of(
    run: Path, scores: list[float], baseline: list[float], truth: dict[str, bool]
) -> Outcome:
    """Return what a finished run reached, with its answers' scores and the SFT model's."""
    won = win_rate(scores, baseline)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    accuracy = record["evaluation"]["eval_rewards/accuracies"]
    if not record["meta_lr"]:
        return Outcome(won.rate, won.low, won.high, accuracy)
    labels = read_json(run / "labels.jsonl")
    p_correct, soft_label, is_flipped = _columns(labels, truth, "p_correct", "soft_label")
    return Outcome(
        won.rate, won.low, won.high, accuracy,
        label_auroc=auroc(p_correct, ~is_flipped),
        label_mean_right=float(soft_label[~is_flipped].mean()),
        label_mean_flipped=float(soft_label[is_flipped].mean()),
    )  # fmt: skip


def result_rows(outcomes: dict[str, Outcome]) -> list[tuple[str, ...]]:
    """Return the table's rows, every number with its unit."""
    rows: list[tuple[str, ...]] = []
    for method, o in outcomes.items():
        wins = "undecided" if o.win_rate is None else f"{o.win_rate:.1%}"
        if o.label_auroc is None:
            labels = "believes every label"
        elif math.isnan(o.label_auroc):
            labels = f"mean {o.label_mean_right:.2f}; none was flipped"
        else:
            labels = (
                f"AUROC {o.label_auroc:.3f}; mean {o.label_mean_right:.2f} where right, "
                f"{o.label_mean_flipped:.2f} where flipped"
            )
        interval = f"{o.win_rate_low:.1%} to {o.win_rate_high:.1%}"
        rows.append((method, f"{wins} ({interval})", f"{o.preference_accuracy:.1%}", labels))
    return rows


def _report(
    home: Path, outcomes: dict[str, Outcome], noise_rate: float, truth: dict[str, bool]
) -> None:
    run = home / "mspo"
    learned_map, label_curves = home / "learned_map.png", home / "label_curves.png"
    ppl_diff, is_flipped = _columns(read_json(run / "labels.jsonl"), truth, "ppl_diff")
    draw_learned_map(load_meta_learner(run), ppl_diff, is_flipped, learned_map)
    history = read_table(run / "label_history.parquet")
    step, soft_label, is_flipped = _columns(history, truth, "step", "soft_label")
    draw_label_curves(step, soft_label, is_flipped, label_curves)
    figures = [
        figure(learned_map, "The learned map", HOW_TO_READ_MAP),
        figure(label_curves, "The labels over training", HOW_TO_READ_CURVES),
    ]
    lead = LEAD.format(rate=f"{noise_rate:.0%}")
    results = table(HEADER, result_rows(outcomes))
    write_text(home / "report.html", page("softpref demo", lead, results, figures, END))


def _columns(pairs: pa.Table, truth: dict[str, bool], *names: str) -> list[Tensor]:
    """Return the named columns of a table of pairs, and last of all which pairs are flipped."""
    is_flipped = [truth[uid] for uid in pairs["uid"].to_pylist()]
    return [torch.tensor(pairs[name].to_pylist()) for name in names] + [torch.tensor(is_flipped)]


def _say(stage: int, what: str) -> None:
    logger.info("[%d/%d] %s", stage, STAGES, what)
