"""`audit --dry_run`: what an audit would read and cost on this machine."""

from __future__ import annotations

import logging

from softpref.auditing.options import AuditOptions
from softpref.auditing.scores import load_scorer
from softpref.data.sources import LoadedPairs
from softpref.judging.options import JudgeOptions
from softpref.training.dry_run import NOTHING, seconds_per_pair
from softpref.training.progress_lines import duration

logger = logging.getLogger(__name__)


def log_cost(
    loaded: LoadedPairs, clean: LoadedPairs, options: AuditOptions, judge: JudgeOptions | None
) -> None:
    """Load the model and log how long it takes to score the pairs.

    Raises:
        UsageError: something is wrong with data or model.
    """
    scorer, prepared = load_scorer(str(options.model), loaded, clean, options)
    trusted = len(prepared.clean) if prepared.clean else 0
    seconds = seconds_per_pair(scorer, prepared.train)
    pairs = len(prepared.train) + trusted
    for model in [options.reward_model] if isinstance(options.reward_model, str) else (
        options.reward_model or ()
    ):  # fmt: skip
        logger.info("reward model %s: %d responses to score, not timed", model, 2 * pairs)
    if judge:
        logger.info("judge %s: asked about %d pairs, not timed", judge.judge, pairs)
    logger.info(
        f"time: about {duration(seconds * pairs)} to score {pairs:,} pairs at "
        f"{1000 * seconds:.0f} ms each, if this machine is idle; {NOTHING}"
    )
