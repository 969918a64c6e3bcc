"""The evaluator that knows the right answers: win rate against the SFT model, by drawn answers."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from softpref.evaluation.win_rate import win_rate
from softpref.training.models import load_policy
from softpref.world.language import make_tokenizer
from softpref.world.prepare import METHOD_DRAWS, PreparedWorld, sampled_scores


class Checker:
    """Compares a run's answers to the world's test prompts with the SFT model's, symbol by symbol.

    `win_rate` (with its 95% interval) is the share of prompts with the higher score, ties left out,
    and is left out where all tie; `score` and `sft_score` are mean shares of symbols in place.
    """

    def __init__(self, world: PreparedWorld) -> None:
        self._seed = world.seed
        self._prompts, self._sft_scores = world.test()

    def scores(self, run: Path) -> list[float]:
        """Return the score of the run's answer to each test prompt."""
        policy = load_policy(str(run), trust_remote_code=False)
        seed = self._seed + METHOD_DRAWS
        return sampled_scores(policy, make_tokenizer(), self._prompts, seed)

    def __call__(self, run: Path) -> dict[str, float]:
        """Return win rate, interval and mean scores."""
        scores = self.scores(run)
        won = win_rate(scores, self._sft_scores)
        rate = {} if won.rate is None else {"win_rate": won.rate}
        return rate | {
            "win_rate_low": won.low,
            "win_rate_high": won.high,
            "score": fmean(scores),
            "sft_score": fmean(self._sft_scores),
        }
