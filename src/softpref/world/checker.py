"""Evaluate a run by the right answers: win rate against the SFT model, on sampled answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from softpref.models.loading import load_policy
from softpref.statistics.win_rate import win_rate
from softpref.world.language import make_tokenizer
from softpref.world.prepare import BASELINE_DRAWS, METHOD_DRAWS, PreparedWorld, sampled_scores


class Checker:
    """Compares a run's answers to the world's test prompts with the SFT model's, symbol by symbol.

    `win_rate` (with its 95% interval) is the share of prompts with the higher score, without ties,
    and is absent if all tie; `score` and `sft_score` are mean shares of correct symbols.

    Args:
        world: the prepared world.
        start: an SFT model to compare with, instead of the world's own.
    """

    def __init__(self, world: PreparedWorld, start: Path | None = None) -> None:
        self._seed = world.seed
        self._prompts, self._sft_scores = world.test()
        if start:
            self._sft_scores = self.answers(start, BASELINE_DRAWS)

    def answers(self, run: Path, draws: int = METHOD_DRAWS) -> list[float]:
        """Return the score of the run's answer to each test prompt, sampled by seed and `draws`."""
        policy = load_policy(str(run), trust_remote_code=False)
        return sampled_scores(policy, make_tokenizer(), self._prompts, self._seed + draws)

    def __call__(self, run: Path) -> dict[str, float]:
        """Return win rate, interval and mean scores."""
        scores = self.answers(run)
        mean = {"score": fmean(scores), "sft_score": fmean(self._sft_scores)}
        return self.compare("win_rate", scores, self._sft_scores) | mean

    def compare(
        self, name: str, scores: Sequence[float], others: Sequence[float]
    ) -> dict[str, float]:
        """Return a win rate under this name, absent if all tie, and its 95% interval."""
        won = win_rate(scores, others)
        rate = {} if won.rate is None else {name: won.rate}
        return rate | {f"{name}_low": won.low, f"{name}_high": won.high}
