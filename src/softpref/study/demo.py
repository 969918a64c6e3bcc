"""`softpref demo`: the full workflow on the synthetic world, with the code of the commands."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from pyarrow.parquet import read_table
from torch import Tensor

from softpref.data.noise import inject
from softpref.errors import UsageError
from softpref.options import option
from softpref.places import directory_to_write
from softpref.study.evaluators import HeldOutPairs, LabelQuality
from softpref.study.figures import draw_label_curves, draw_learned_map, draw_learned_plane
from softpref.study.readings import flips_by_uid
from softpref.study.report import figure, page, table
from softpref.training.align import AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.labels import read_labels
from softpref.training.output import new_directory, write_text
from softpref.training.teacher import load_meta_learner
from softpref.world.build import INFORMATIVE
from softpref.world.checker import Checker
from softpref.world.prepare import alignment, prepare_world

logger = logging.getLogger(__name__)

STAGES = 6
COMPARED = ("dpo", "mspo", "evidence")
MARK = ".softpref-demo"
_HEADER = ("method", "win rate against SFT (95%)", "accuracy on clean pairs", "labels")
WIDTHS = (8, 28, 23, 6)

LEAD = (
    "A tiny language model learned to sort, reverse and shift symbols from faulty answers. It was "
    "then aligned on preference pairs of which {rate} have the wrong label. DPO believes every "
    "label. MSPO learns from 150 trusted pairs how much to believe each label, given its PPLDiff. "
    "softpref's method evidence learns this from the same pairs with more than one signal. Win "
    "rate: share of new prompts on which the aligned model's answer has more symbols in place than "
    "the SFT model's, without ties. Accuracy: share of held-out, correctly labelled pairs whose "
    "right answer the policy prefers more than before."
)
HOW_TO_READ_MAP = (
    "Top: the soft label that the meta-learner gives to a pair by its PPLDiff. Near 1 the label is "
    "believed, near 0 it is reversed, at 0.5 the pair is ignored. Bottom: the distribution of "
    "right and flipped labels; softpref never saw which is which. A good map is high over the "
    "right labels and low over the flipped ones. Where the two overlap, PPLDiff cannot separate "
    "them, and the map follows the trusted pairs."
)
HOW_TO_READ_PLANE = (
    "Each point is a pair, colored by the soft label that method evidence trained it with: blue is "
    "believed, red is reversed. The horizontal axis is the evidence for the label before training, "
    "from fluency, length and what the responses say. The vertical axis is the policy's margin "
    "just before it saw this label. A good model has blue points in the upper panel and red ones "
    "in the lower."
)
HOW_TO_READ_CURVES = (
    "The mean soft label of MSPO's pairs by step. The warm start separates right and flipped "
    "labels as well as PPLDiff of the SFT model can. If the gap then grows, the policy's own "
    "progress improves the signal: the paper calls this dynamic. Lines that stay together would "
    "mean that PPLDiff says nothing about the labels."
)
END = "One seed of a small world shows how the method works, not how well it does on your data."


@dataclass
class DemoOptions:
    """Options of `softpref demo`."""

    output: str = option(
        "Directory for the demo; an earlier demo in it is replaced.", "runs/demo", metavar="DIR"
    )
    noise_rate: float = option("Share of training labels to flip.", 0.4)
    seed: int = option("Seed for world, models and flips.", 1000)


def run_demo(options: DemoOptions) -> None:
    """Make the world, fit the SFT model, flip labels, align by each method, sample, and report.

    Raises:
        UsageError: the output directory has contents that no demo made.
    """
    if not 0 <= options.noise_rate < 1:
        raise UsageError(f"--noise_rate {options.noise_rate}: must be at least 0 and below 1.")
    start = time.monotonic()
    home = _fresh_directory(options.output)
    _log_stage(1, "SFT of a tiny Llama on faulty answers; pairs of a teacher's and its own answers")
    world = prepare_world(INFORMATIVE, options.seed, home)
    _log_stage(2, f"flip {options.noise_rate:.0%} of the labels")
    noisy = str(home / "noisy.jsonl")
    flips = inject(world.pairs("train"), noisy, options.noise_rate, options.seed)
    logger.info(
        "  %d of %d labels flipped (%.1f%%)", flips.flipped, flips.pairs, 100 * flips.realised_rate
    )
    for stage, method in enumerate(COMPARED, start=3):
        _log_stage(stage, f"align with {method}")
        files = AlignFiles(
            world.sft, noisy, world.pairs("clean"), world.pairs("eval"), str(home / method)
        )
        align(files, MSPOConfig(**alignment(method, options.seed)))
    _log_stage(STAGES, "sample answers to new prompts and compare")
    evaluators = (Checker(world), HeldOutPairs(world.pairs("eval")), LabelQuality(noisy))
    outcomes = {
        method: {k: v for evaluate in evaluators for k, v in evaluate(home / method).items()}
        for method in COMPARED
    }
    summary = {
        "noise_rate": options.noise_rate,
        "seconds": round(time.monotonic() - start, 1),
        "methods": outcomes,
    }
    write_text(home / "summary.json", json.dumps(summary, indent=2) + "\n")
    _report(home, outcomes, options.noise_rate, flips_by_uid(noisy))
    for row in (_HEADER, *result_rows(outcomes)):
        logger.info("  ".join(cell.ljust(width) for cell, width in zip(row, WIDTHS, strict=True)))
    logger.info("%.0f seconds; open %s", summary["seconds"], home / "report.html")


def _fresh_directory(path: str) -> Path:
    home = directory_to_write(path)
    if (home / MARK).is_file():
        shutil.rmtree(home)
    home = new_directory(path)
    home.mkdir(parents=True, exist_ok=True)
    write_text(home / MARK, "made by softpref demo; running it again replaces this directory\n")
    return home


def result_rows(outcomes: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """Return the table's rows; every number has its unit."""
    rows: list[tuple[str, ...]] = []
    for method, o in outcomes.items():
        wins = f"{o['win_rate']:.1%}" if "win_rate" in o else "undecided"
        if "label_mean_right" not in o:
            labels = "believes every label"
        elif "label_auroc" not in o:
            labels = f"mean {o['label_mean_right']:.2f}; none was flipped"
        else:
            labels = (
                f"AUROC {o['label_auroc']:.3f}; mean {o['label_mean_right']:.2f} where right, "
                f"{o['label_mean_flipped']:.2f} where flipped"
            )
        interval = f"{o['win_rate_low']:.1%} to {o['win_rate_high']:.1%}"
        accuracy = f"{o['preference_accuracy']:.1%}"
        rows.append((method, f"{wins} ({interval})", accuracy, labels))
    return rows


def _report(
    home: Path, outcomes: dict[str, dict[str, float]], noise_rate: float, truth: dict[str, bool]
) -> None:
    run = home / "mspo"
    learned_map, label_curves = home / "learned_map.png", home / "label_curves.png"
    ppl_diff, is_flipped = _columns(read_labels(run / "labels.jsonl"), truth, "ppl_diff")
    draw_learned_map(load_meta_learner(run), ppl_diff, is_flipped, learned_map)
    history = read_table(run / "label_history.parquet")
    step, soft_label, is_flipped = _columns(history, truth, "step", "soft_label")
    draw_label_curves(step, soft_label, is_flipped, label_curves)
    learned_plane = home / "learned_plane.png"
    evidence, margin, label, is_flipped = _first_labels(home / "evidence", truth)
    draw_learned_plane(evidence, margin, label, is_flipped, learned_plane)
    figures = [
        figure(learned_map, "What MSPO has learned", HOW_TO_READ_MAP),
        figure(learned_plane, "What evidence has learned", HOW_TO_READ_PLANE),
        figure(label_curves, "The labels over training", HOW_TO_READ_CURVES),
    ]
    lead = LEAD.format(rate=f"{noise_rate:.0%}")
    results = table(_HEADER, result_rows(outcomes))
    write_text(home / "report.html", page("softpref demo", lead, results, figures, END))


def _first_labels(run: Path, truth: dict[str, bool]) -> list[Tensor]:
    """Return the evidence, margins, first labels and truth of a run's pairs, (n,) each."""
    history = read_table(run / "label_history.parquet").group_by("uid", use_threads=False)
    first = history.aggregate([("margin", "first"), ("soft_label", "first")])
    known = read_labels(run / "labels.jsonl").select(["uid", "evidence"])
    names = ("evidence", "margin_first", "soft_label_first")
    return _columns(first.join(known, "uid"), truth, *names)


def _columns(pairs: pa.Table, truth: dict[str, bool], *names: str) -> list[Tensor]:
    """Return the named columns of a table of pairs, and then which pairs are flipped."""
    is_flipped = [truth[uid] for uid in pairs["uid"].to_pylist()]
    return [torch.tensor(pairs[name].to_pylist()) for name in names] + [torch.tensor(is_flipped)]


def _log_stage(stage: int, text: str) -> None:
    logger.info("[%d/%d] %s", stage, STAGES, text)
