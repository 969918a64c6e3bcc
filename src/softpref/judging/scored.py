"""Judges that score each response by itself, so that the order has no effect.

Shapes: B questions per batch.
"""

from __future__ import annotations

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.data.column_cache import ColumnCache
from softpref.data.messages import Message, Text, as_text
from softpref.data.readers import RowError
from softpref.data.tokens import PARTS, TokenizedPair, TooLongError, sequence_ids, tokenize_pair
from softpref.errors import UsageError
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Answer, Question
from softpref.judging.reward_cache import RewardCache, token_key
from softpref.models.library_errors import in_one_sentence
from softpref.models.loading import (
    context_length,
    load_classifier,
    load_policy,
    load_tokenizer,
    on_accelerator,
    read_tokenizer,
)
from softpref.models.reference import fingerprint_weights
from softpref.models.scoring import Scorer
from softpref.models.soundness import (
    embedding_rows,
    require_finite_weights,
    require_known_tokens,
    require_sound,
)
from softpref.quantization import Bits
from softpref.world.language import score

logger = logging.getLogger(__name__)


class ScoringJudge(ABC):
    """Turns scores into verdicts: the higher score wins, equal scores and equal texts tie."""

    identity: Mapping[str, Any]
    sees_order = False
    account = None
    batch_size = 1000

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Yield every question with its answer."""
        for question in questions:
            if question.first == question.second:
                yield question, Answer("tie")
        different = [question for question in questions if question.first != question.second]
        try:
            for start in range(0, len(different), self.batch_size):
                batch = different[start : start + self.batch_size]
                for question, answer in zip(batch, self.answers(batch), strict=True):
                    yield question, answer
        finally:
            self.finish()

    @abstractmethod
    def answers(self, batch: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions whose texts differ."""

    def finish(self) -> None:  # noqa: B027
        """Keep what the answers so far have taught, if anything."""


PASSES = 8
"""Forward passes of each of several processes between two exchanges; they even out."""
_DOES_NOT_FIT = Answer(None, "does not fit the context")
_NO_TOKENS = Answer(None, "cannot be tokenized")


def _by_score(difference: float) -> Answer:
    if difference != difference:
        return Answer(None, "score is NaN")
    return Answer("A" if difference > 0 else "B" if difference < 0 else "tie")


def _responses(question: Question) -> tuple[Text, Text]:
    return question.first, question.second


def _groups(numbers: Iterable[int], size: int) -> list[list[int]]:
    """Return ascending numbers by which multiples of `size` they lie between."""
    return [list(some) for _, some in groupby(numbers, lambda number: number // size)]


def _reply(response: Text) -> list[Message]:
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    return response


def _locations(
    questions: Sequence[Question], ids: Iterable[Sequence[Sequence[int]]]
) -> Iterator[tuple[str, list[int]]]:
    """Yield the location and the token ids of each question."""
    for question, parts in zip(questions, ids, strict=True):
        yield f"comparison {question.uid}", [token for part in parts for token in part]


class RewardModel(ScoringJudge):
    """A sequence classifier with one output, applied to the rendered prompt and response.

    Text becomes a user and an assistant turn. Without a chat template, prompt and response are
    concatenated, with EOS and the tokenizer's special tokens. A reward is computed once, and kept
    by weights and token ids. Ranks share each batch.

    Args:
        source: a directory or hub id.
        batch_size: pairs in one forward pass.
        cache: where rewards are kept.
        option: that names the model, for messages.
        ranks: who shares the passes; the first of them reads and writes the cache.
        bits: of its linear layers; None leaves them as they are.
        dtype: of its weights; None is that of its files.

    Raises:
        UsageError: the model does not exist, or has several outputs.
    """

    def __init__(
        self,
        source: str,
        batch_size: int,
        cache: ColumnCache,
        option: str = "--judge_model",
        ranks: Ranks = ALONE,
        bits: Bits | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        model: Any = load_classifier(source, bits=bits, dtype=dtype, option=option)
        place = f"{option} {source}"
        self._tokenizer = read_tokenizer(source, place, trust_remote_code=False)
        require_finite_weights(model)
        if model.config.num_labels != 1:
            raise UsageError(
                f"{place}: has {model.config.num_labels} outputs; a reward model has one."
            )
        # The reward is read at the last token that is not padding, so EOS must not be the padding.
        pad = self._tokenizer.pad_token_id
        known = pad is not None and pad < embedding_rows(model)
        self._pads = known and pad != self._tokenizer.eos_token_id
        model.config.pad_token_id = pad if self._pads else None
        self._model = on_accelerator(model)
        self._longest = context_length(model)
        with in_one_sentence(place, "the model cannot be run", source):
            self._rewards([[0]])
        self._forward_size, self._ranks = batch_size, ranks
        self.batch_size = batch_size * (1 if ranks.count == 1 else PASSES * ranks.count)
        weights = fingerprint_weights(model)
        self.identity = {"judge": "reward_model", "model": source, "weights": weights}
        self._cache = RewardCache(cache, weights)
        self._asked = self._known = 0

    def answers(self, batch: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions whose texts differ."""
        found = self.differences(batch)
        return [one if isinstance(one, Answer) else _by_score(one) for one in found]

    def differences(self, batch: Sequence[Question]) -> list[float | Answer]:
        """Return the reward of A minus that of B, or a failed answer."""
        encoded: dict[int, list[list[int]]] = {}
        answers: dict[int, float | Answer] = {}
        for i, question in enumerate(batch):
            try:
                encoded[i] = [self._ids(question, text) for text in _responses(question)]
            except RowError:
                answers[i] = _NO_TOKENS
        require_known_tokens(
            self._model, self._tokenizer, _locations([batch[i] for i in encoded], encoded.values())
        )
        fits = {i: pair for i, pair in encoded.items() if max(map(len, pair)) <= self._longest}
        answers |= self._shared_differences(fits)
        return [answers.get(i, _DOES_NOT_FIT) for i in range(len(batch))]

    def finish(self) -> None:
        """Write the rewards to the cache, and log how many of them were known."""
        if self._ranks.is_first and self._asked:
            self._cache.save()
            known, asked = f"{self._known:,}", f"{self._asked:,}"
            logger.info("%s: %s of %s rewards from the cache", self.identity["model"], known, asked)
        self._asked = self._known = 0

    def _shared_differences(self, pairs: dict[int, list[list[int]]]) -> dict[int, float]:
        """Return the reward of A minus that of B by question; ranks deal forward passes."""
        keys = {i: [token_key(ids) for ids in pair] for i, pair in pairs.items()}
        every = dict.fromkeys(chain.from_iterable(keys.values()))
        # The first rank's, since others may find another file.
        stored = self._cache.known(every) if self._ranks.is_first else {}
        known = json.loads(self._ranks.from_first(json.dumps(stored)))
        self._asked, self._known = self._asked + len(every), self._known + len(known)
        missing = [key for key in every if key not in known]
        sequences = [
            {key: ids for i in some for key, ids in zip(keys[i], pairs[i], strict=True)}
            for some in _groups(pairs, self._forward_size)
        ]
        new = dict(zip(missing, self._shared_rewards(sequences, missing), strict=True))
        if self._ranks.is_first:
            self._cache.add({key: reward for key, reward in new.items() if math.isfinite(reward)})
        found = known | new
        return {i: found[first] - found[second] for i, (first, second) in keys.items()}

    def _shared_rewards(
        self, groups: Sequence[Mapping[str, list[int]]], missing: Sequence[str]
    ) -> list[float]:
        """Return the missing rewards; each group of sequences has a pass, without earlier ones."""
        left = {key: number for number, key in enumerate(missing)}
        passes = [
            [(left.pop(key), ids) for key, ids in some.items() if key in left] for some in groups
        ]
        # Long ones first, so that ranks have about as many tokens.
        passes.sort(key=lambda some: -sum(len(ids) for _, ids in some))
        mine = passes[self._ranks.rank :: self._ranks.count]
        rewards = [reward for some in mine for reward in self._rewards([ids for _, ids in some])]
        places = torch.tensor([number for some in mine for number, _ in some], dtype=torch.long)
        scores = torch.tensor(rewards, dtype=torch.float64)
        places, scores = self._ranks.gather([places, scores])
        return scores[places.argsort()].tolist()

    def _rewards(self, sequences: list[list[int]]) -> list[float]:
        rewards: list[float] = []
        size = max(1, len(sequences)) if self._pads else 1
        for start in range(0, len(sequences), size):
            batch = {"input_ids": sequences[start : start + size]}
            padded = self._tokenizer.pad(batch, padding=self._pads, return_tensors="pt")
            inputs = {name: ids.to(self._model.device) for name, ids in padded.items()}
            with torch.no_grad():
                rewards += self._model(**inputs).logits.float().flatten().tolist()
        return rewards

    def _ids(self, question: Question, response: Text) -> list[int]:
        prompt: Text = question.prompt
        answer = response
        if not isinstance(prompt, str) or self._tokenizer.chat_template is not None:
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            answer = _reply(response)
        ids = sequence_ids(prompt, answer, self._tokenizer, question.context)
        if not ids:
            raise RowError("prompt and response have no token")
        return ids


class ImplicitReward(ScoringJudge):
    """The implicit reward β log π/π_ref of an aligned policy; A wins if its margin h is above 0.

    Not an independent judge: a policy prefers what it was trained to write. Responses are truncated
    to the context. Ranks share each batch.

    Raises:
        UsageError: a model cannot be loaded.
    """

    def __init__(self, options: JudgeOptions, ranks: Ranks = ALONE) -> None:
        policy, reference = str(options.judge_model), str(options.judge_reference)
        option, bits = "--judge_reference", options.bits()
        dtype = torch.bfloat16 if options.judge_bf16 else torch.float32
        self._tokenizer = load_tokenizer(reference, trust_remote_code=False, option=option)
        self._policies = [
            on_accelerator(
                load_policy(path, trust_remote_code=False, dtype=dtype, bits=bits, option=option)
            )
            for path, option in ((policy, "--judge_model"), (reference, option))
        ]
        for loaded in self._policies:
            require_sound(loaded)
        self._longest = min(map(context_length, self._policies))
        self._forward_size, self._ranks = options.judge_batch_size, ranks
        self.batch_size = 64 * options.judge_batch_size
        self.identity = {
            "judge": "implicit_reward",
            "model": policy,
            "weights": [fingerprint_weights(policy) for policy in self._policies],
        }

    def answers(self, batch: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions whose texts differ."""
        tokenized: dict[int, TokenizedPair] = {}
        answers: dict[int, Answer] = {}
        for i, question in enumerate(batch):
            try:
                tokenized[i] = self._pair(question)
            except RowError as error:
                answers[i] = self._untokenized(question, error)
        if tokenized:
            margins = self._margins([batch[i] for i in tokenized], list(tokenized.values()))
            answers |= zip(tokenized, map(_by_score, margins), strict=True)
        return [answers[i] for i in range(len(batch))]

    def _pair(self, question: Question) -> TokenizedPair:
        prompt, (first, second) = question.prompt, _responses(question)
        sides = (first, second)
        if not isinstance(prompt, str):
            sides = _reply(first), _reply(second)
        pair = {**question.context, "prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        return tokenize_pair(pair, self._tokenizer, self._longest)

    def _untokenized(self, question: Question, error: RowError) -> Answer:
        """Return a tie for texts with the same tokens, else the failure."""
        first, second = (
            self._tokenizer(as_text(text))["input_ids"] for text in _responses(question)
        )
        if first == second:
            return Answer("tie")
        return _DOES_NOT_FIT if isinstance(error, TooLongError) else _NO_TOKENS

    def _margins(
        self, questions: Sequence[Question], tokenized: Sequence[TokenizedPair]
    ) -> list[float]:
        """Return h(first, second) per question, without β, in nats."""
        ids = [[getattr(pair, part) for part in PARTS] for pair in tokenized]
        for loaded in self._policies:
            require_known_tokens(loaded, self._tokenizer, _locations(questions, ids))
        pairs = Dataset.from_list([dict(zip(PARTS, parts, strict=True)) for parts in ids])
        policy, reference = (self._differences(policy, pairs) for policy in self._policies)
        return (policy - reference).tolist()

    def _differences(self, policy: Any, pairs: Dataset) -> Tensor:
        """Return log π(first) − log π(second), (B,), nats."""
        scorer = Scorer(policy, batch_size=self._forward_size, ranks=self._ranks)
        scored = scorer.measure(pairs, "judging")
        return scored.chosen_logp - scored.rejected_logp


class RightAnswers(ScoringJudge):
    """The checker of the synthetic world: the larger share of correct symbols wins."""

    identity: Mapping[str, Any] = {"judge": "checker"}

    def answers(self, batch: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions whose texts differ."""
        try:
            return [
                _by_score(score(prompt, as_text(q.first)) - score(prompt, as_text(q.second)))
                for q in batch
                for prompt in [as_text(q.prompt)]
            ]
        except ValueError as error:
            raise UsageError(f"--judge checker: {error}; choose another judge.") from None
