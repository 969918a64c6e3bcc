"""Referees of a study compare the answers of two models: the world's checker, or a judge."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from softpref.data.bad_rows import place
from softpref.data.readers import dataset_rows
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.judging.ask import ask_judge, make_judge
from softpref.judging.generate import ids_to_continue
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Comparison
from softpref.judging.rates import judged_rate
from softpref.judging.responses import Prompt, context_of, prompt_uid
from softpref.models.loading import context_length, load_policy, load_tokenizer, on_accelerator
from softpref.models.reference import fingerprint_weights
from softpref.models.sampling import sample
from softpref.models.soundness import require_known_tokens
from softpref.study.evaluators import Evaluator
from softpref.study.grid import Cell
from softpref.training.align import AlignFiles
from softpref.training.output import write_text
from softpref.world.prepare import BASELINE_DRAWS, METHOD_DRAWS

RIVAL_DRAWS = METHOD_DRAWS + 1_000_000
RESPONSE_TOKENS = 256
_BATCH_SIZE = 16


class Referee(Protocol):
    """Compares answers of two models to the same prompts: the world's `Checker`, or a judge."""

    def __call__(self, run: Path, /) -> dict[str, float]:
        """Return the win rate of a run against the model it started from."""

    def answers(self, run: Path, draws: int) -> Sequence[Any]:
        """Return what to compare of a run, sampled with the referee's seed and `draws`."""

    def compare(self, name: str, answers: Sequence[Any], others: Sequence[Any]) -> dict[str, float]:
        """Return a win rate under this name, and its 95% interval as `_low` and `_high`."""


@dataclass(frozen=True)
class ResponseSampling:
    """Settings for sampling responses to the prompts of a file; greedy at temperature 0."""

    source: str
    prompts: Sequence[Prompt]
    seed: int
    temperature: float
    max_new_tokens: int = RESPONSE_TOKENS

    def describe(self) -> list[Any]:
        """Return everything but the model that responses depend on."""
        prompts = [[prompt.prompt, prompt.context] for prompt in self.prompts]
        return [prompts, self.seed, self.temperature, self.max_new_tokens]


@dataclass(frozen=True)
class JudgeReferee:
    """A judge whose verdicts are stored beside the cell's directory, so that none is paid twice.

    Attributes:
        options: options of the judge.
        sampling: settings for responses.
        start: the model that training started from.
        cell: the cell's directory.
    """

    options: JudgeOptions
    sampling: ResponseSampling
    start: str
    cell: Path

    def __call__(self, run: Path) -> dict[str, float]:
        """Return win rate, interval, bounds and shares of failures and flips."""
        start = self.answers(Path(self.start), BASELINE_DRAWS)
        return self.compare("win_rate", self.answers(run, METHOD_DRAWS), start)

    def answers(self, run: Path, draws: int) -> Sequence[str]:
        """Return responses; cells that share a model also share its responses."""
        policy = load_policy(str(run), trust_remote_code=False)
        version = [fingerprint_weights(policy), self.sampling.describe(), draws]
        name = hashlib.sha256(json.dumps(version).encode()).hexdigest()[:24]
        path = self.cell.parent / "responses" / f"{name}.json"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps(self._sample(policy, run, draws)))
        found: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _sample(self, policy: Any, run: Path, draws: int) -> list[str]:
        tokenizer = load_tokenizer(str(run), trust_remote_code=False)
        source, prompts, seed = self.sampling.source, self.sampling.prompts, self.sampling.seed
        ids = [ids_to_continue(prompt, source, tokenizer) for prompt in prompts]
        where = (place(source, prompt.row) for prompt in prompts)
        require_known_tokens(policy, tokenizer, zip(where, ids, strict=True))
        longest = min(self.sampling.max_new_tokens, context_length(policy) // 2)
        room = context_length(policy) - longest
        long = [prompt for prompt, tokens in zip(prompts, ids, strict=True) if len(tokens) > room]
        if long:
            raise UsageError(
                f"{place(source, long[0].row)}: this and {len(long) - 1} more of the {len(ids)} "
                f"prompts leave fewer than {longest} tokens of the model's context for a response: "
                "remove them."
            )
        options = {"batch_size": _BATCH_SIZE, "max_new_tokens": longest, "seed": seed + draws}
        temperature = self.sampling.temperature
        return sample(on_accelerator(policy), tokenizer, ids, temperature=temperature, **options)

    def compare(self, name: str, answers: Sequence[str], others: Sequence[str]) -> dict[str, float]:
        """Return the share of decided comparisons that were won, with interval and bounds."""
        comparisons: list[Comparison] = []
        for prompt, ours, theirs in zip(self.sampling.prompts, answers, others, strict=True):
            text, context = prompt.prompt, prompt.context
            uid = f"{prompt_uid(text, 0, context)}-{len(comparisons)}"
            comparisons.append(Comparison(uid, text, ours, theirs, context))
        log = self.cell.with_name(f"{self.cell.name}.verdicts.jsonl")
        with VerdictLog(log) as verdicts:
            judge = make_judge(self.options)
            judged = ask_judge(comparisons, judge, self.options, verdicts)
        rate = judged_rate(judged.outcomes, judged.first_share)
        numbers = {
            "low": rate.interval[0],
            "high": rate.interval[1],
            "if_failures_lost": rate.bounds[0],
            "if_failures_won": rate.bounds[1],
            "failed": rate.failed / rate.asked,
            "flipped": rate.flipped / rate.asked,
        }
        named = {f"{name}_{what}": number for what, number in numbers.items()}
        return named if rate.rate is None else named | {name: rate.rate}


def distinct_prompts(test: str) -> list[Prompt]:
    """Return the distinct prompts of a file of pairs, each at its first row.

    Prompts with different tools or template arguments are distinct.
    """
    prompts: dict[str, Prompt] = {}
    for row in dataset_rows(load_pairs(test).pairs):
        prompt = Prompt(row["prompt"], context_of(row), row["row"])
        prompts.setdefault(prompt_uid(prompt.prompt, 0, prompt.context), prompt)
    return list(prompts.values())


def referee_evaluators(
    cell: Cell, files: AlignFiles, referee: Referee, align: Callable[[Cell, AlignFiles], None]
) -> list[Evaluator]:
    """Return evaluators of win rates against the start, a rival, and at checkpoints.

    Args:
        cell: the cell.
        files: files of the run.
        referee: compares answers.
        align: trains a cell.
    """
    evaluators: list[Evaluator] = [referee]
    if cell.rival:
        evaluators.append(_head_to_head(cell, files, referee, align))
    if cell.measure_every:
        evaluators.append(partial(_at_checkpoints, referee))
    return evaluators


def _head_to_head(
    cell: Cell, files: AlignFiles, referee: Referee, align: Callable[[Cell, AlignFiles], None]
) -> Evaluator:
    """Train the rival on the same pairs, and return an evaluator against its sampled answers."""
    assert cell.rival
    own = replace(files, output=f"{files.output}-of-{cell.rival}")
    align(replace(cell, method=cell.rival), own)
    theirs = referee.answers(Path(own.output), RIVAL_DRAWS)
    shutil.rmtree(own.output)
    return lambda run: referee.compare("rival_win_rate", referee.answers(run, METHOD_DRAWS), theirs)


def _at_checkpoints(referee: Referee, run: Path) -> dict[str, float]:
    """Return the win rate at every checkpoint, as `win_rate_at_STEP`."""
    return {
        f"win_rate_at_{checkpoint.name.removeprefix('checkpoint-')}": numbers["win_rate"]
        for checkpoint in sorted(run.glob("checkpoint-*"))
        if "win_rate" in (numbers := referee(checkpoint))
    }
