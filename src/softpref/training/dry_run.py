"""`train --dry_run`: what a run would read, do and cost on this machine."""

from __future__ import annotations

import logging
from time import monotonic

from datasets import Dataset

from softpref.models.layout import choose_layout, longest_pairs
from softpref.models.loading import make_trainable
from softpref.models.quantized import quantization_constants
from softpref.models.scoring import Scorer
from softpref.options import require
from softpref.training.align import AlignFiles, load_sets
from softpref.training.config import MSPOConfig, recipe
from softpref.training.perpcorrect.surrogates import EPOCHS, MORE_EACH_ROUND, ROUNDS
from softpref.training.progress_lines import duration
from softpref.training.recipes import teaching_share
from softpref.training.start import load_checked

logger = logging.getLogger(__name__)

TIMED_PAIRS = 16
BACKWARD = 2
"""A backward pass takes about as long as two forward passes."""
ADAMW_BYTES = 12
"""Bytes of a trained float32 weight's gradient and two moments."""
NOTHING = "nothing was run or written"


def dry_run(files: AlignFiles, config: MSPOConfig) -> None:
    """Read the data and load the model; log counts, steps, recipe, memory and time; stop.

    Raises:
        UsageError: something is wrong with data, model or options.
    """
    require(files)
    sets = load_sets(files, config.on_bad_row, config.seed, config.soft_label_from)
    policy, _, prepared = load_checked(files.model, config, sets)
    probe = longest_pairs(*prepared.named().values())
    layout = choose_layout(config.resolved_layout(), policy, probe)
    logger.info("layout: %s", layout.why)
    seconds = seconds_per_pair(config.scorer(policy, layout.apply(policy)), prepared.train)
    policy = make_trainable(policy, config.tuning, config.adapter())
    filled = ", ".join(f"{name} {getattr(config, name)}" for name in recipe(config.recipe))
    logger.info("recipe %s: %s", config.recipe, filled)
    steps = config.total_steps(len(prepared.train))
    logger.info("steps: %d of %d pairs", steps, config.pairs_per_step())
    weights = sum(weight.nbytes for weight in policy.parameters())
    weights += sum(constants.nbytes for _, constants in quantization_constants(policy))
    moving = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    gib = (weights + ADAMW_BYTES * moving) / 2**30
    logger.info(
        f"memory: {gib:.2f} GiB for the weights and what AdamW keeps of {moving:,} trained "
        "parameters; activations and per-pair gradients are not counted"
    )
    meta = 0.0
    if config.resolved_method().teaches and config.meta_batch_size and config.meta_every:
        pairs = config.pairs_per_step()
        meta = teaching_share(config.meta_batch_size, pairs, config.meta_every)
    trained = steps * config.pairs_per_step()
    once = sum(map(len, prepared.named().values()))
    again = sum(map(len, prepared.evaluation.values()))
    if config.label_pairs or (config.label_pairs is None and config.resolved_method().doubts):
        again = once
    if "corrected_labels" in config.resolved_method().needs:
        noisy, trusted = len(prepared.train), len(prepared.clean or ())
        again += ROUNDS * noisy
        each = sum(trusted + MORE_EACH_ROUND * number * noisy for number in range(ROUNDS))
        trained += round(EPOCHS * each)
    passes = forward_passes(once, again, trained, meta)
    logger.info(
        f"time: about {duration(seconds * passes)}, as long as {passes:,.0f} forward "
        f"passes of a pair at {1000 * seconds:.0f} ms, if this machine is idle; {NOTHING}"
    )


def forward_passes(once: int, again: int, trained: int, meta: float) -> float:
    """Return a run's cost in forward passes of one pair.

    Args:
        once: all pairs, which the reference pass reads.
        again: those that labelling, evaluation at the end and PerpCorrect's rounds read once more.
        trained: the pairs of all steps.
        meta: m of `teaching_share`.
    """
    return once + again + trained * (1 + BACKWARD) * (1 + meta)


def seconds_per_pair(scorer: Scorer, pairs: Dataset) -> float:
    """Return the seconds of a forward pass by pair, timed on pairs from all over a set."""
    sample = pairs.select(range(0, len(pairs), -(-len(pairs) // TIMED_PAIRS)))
    scorer.measure(sample.select([0]), "warm-up")
    began = monotonic()
    scorer.measure(sample, "timing")
    return (monotonic() - began) / len(sample)
