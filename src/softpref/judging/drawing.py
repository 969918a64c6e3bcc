"""Responses drawn from a local model, in batches that several processes share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from softpref.algorithm.ranks import Ranks
from softpref.judging.generate_options import GenerateOptions
from softpref.judging.log import resume_from
from softpref.models.library_errors import COMPLETE, in_one_sentence
from softpref.models.sampling import sample
from softpref.progress import Progress

ROUND = 4
"""Batches of each of several processes in a round: responses differ in length, which evens out."""


@dataclass(frozen=True)
class Drawing:
    """Responses to be drawn, in batches that the processes deal among them."""

    policy: nn.Module
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[list[int]]
    options: GenerateOptions
    ranks: Ranks

    def draw_all(self, record: dict[str, Any], progress: Path) -> list[list[str]]:
        """Return a list of responses per sample, in the order of the prompts.

        Every round of batches is on disk before the next one starts.
        """
        done = resume_from(progress, record)
        self.ranks.from_first(json.dumps(len(done)))
        batches, samples = self._batches(), self.options.samples
        before = sum(len(members) for _, members in batches[: len(done)])
        bar = Progress("generating", samples * len(self.prompts), "response", done=before)
        with progress.open("a", encoding="utf-8") as file, bar:
            for drawn in self._rounds(len(done)):
                done += drawn
                file.writelines(json.dumps(responses) + "\n" for responses in drawn)
                file.flush()
                os.fsync(file.fileno())
                bar.update(sum(map(len, drawn)))
        found = [[""] * len(self.prompts) for _ in range(samples)]
        for (n, members), responses in zip(batches, done, strict=True):
            for i, response in zip(members, responses, strict=True):
                found[n][i] = response
        return found

    def draw_along(self) -> None:
        """Draw this process' share of what the first process writes."""
        for _ in self._rounds(json.loads(self.ranks.from_first())):
            pass

    def _rounds(self, done: int) -> Iterator[list[list[str]]]:
        """Draw the batches after the first `done`; yield those of one round, in their order.

        A batch has a seed of its own, whichever process draws it.
        """
        batches, ranks = self._batches(), self.ranks
        size = ranks.count * (ROUND if ranks.count > 1 else 1)
        for start in range(done, len(batches), size):
            numbers = range(start, min(start + size, len(batches)))
            mine = []
            for number in numbers[ranks.rank :: ranks.count]:
                prompts = [self.prompts[i] for i in batches[number][1]]
                seed = _seed(self.options.seed, number)
                mine.append(draw(self.policy, self.tokenizer, prompts, self.options, seed))
            drawn: list[list[str]] = [[]] * len(numbers)
            for rank, text in enumerate(ranks.gather_text(json.dumps(mine))):
                drawn[rank :: ranks.count] = json.loads(text)
            yield drawn

    def _batches(self) -> list[tuple[int, list[int]]]:
        """Return every batch: the number of its sample, and the places of its prompts."""
        size = self.options.batch_size
        order = sorted(range(len(self.prompts)), key=lambda i: (len(self.prompts[i]), i))
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        return [(n, members) for n in range(self.options.samples) for members in groups]


def draw(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    options: GenerateOptions,
    seed: int,
) -> list[str]:
    """Return one response to each prompt.

    Raises:
        UsageError: the model cannot generate.
    """
    by_model = options.generation_config == "model"
    what = "its own settings do not work here" if by_model else "it generates nothing"
    remedy = "use --generation_config plain" if by_model else COMPLETE
    with in_one_sentence(f"--model {options.model}", what, options.model, remedy):
        return sample(
            policy,
            tokenizer,
            prompts,
            max_new_tokens=cast(int, options.max_new_tokens),
            temperature=options.temperature,
            seed=seed,
            batch_size=options.batch_size,
        )


def _seed(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:7])
