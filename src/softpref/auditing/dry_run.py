"""`audit --dry_run`: what an audit would read and cost on this machine."""

from __future__ import annotations

import logging

from softpref.auditing.options import AuditOptions
from softpref.auditing.scores import scorer_for
from softpref.judging.options import JudgeOptions
from softpref.training.dry_run import NOTHING, seconds_per_pair
from softpref.training.progress_lines import duration
from softpref.training.sets import Sets

logger = logging.getLogger(__name__)


def log_cost(sets: Sets, options: AuditOptions, judge: JudgeOptions | None) -> None:
    """Load the model and log how long it takes to score the pairs.

    Raises:
        UsageError: something is wrong with data or model.
    """
    assert sets.clean is not None
    with scorer_for(str(options.model), sets.train, sets.clean, options) as (scorer, prepared):
        seconds = seconds_per_pair(scorer, prepared.train)
    pairs = sum(map(len, prepared.named().values()))
    for model in options.reward_model or ():
        logger.info("reward model %s: %d responses to score, not timed", model, 2 * pairs)
    if judge:
        logger.info("judge %s: asked about %d pairs, not timed", judge.judge, pairs)
    logger.info(
        f"time: about {duration(seconds * pairs)} to score {pairs:,} pairs at "
        f"{1000 * seconds:.0f} ms each, if this machine is idle; {NOTHING}"
    )
