"""Judges that score each response for itself, so that no order can sway them.

Shapes: B questions a batch.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from softpref.data.batches import PARTS, make_batch
from softpref.data.readers import RowError
from softpref.data.tokens import TokenizedPair, tokenize_pair
from softpref.errors import UsageError
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Answer, Question
from softpref.training.fit import require_finite_weights, require_known_tokens, require_sound
from softpref.training.models import (
    context_length,
    load_classifier,
    load_policy,
    load_tokenizer,
    read_tokenizer,
)
from softpref.training.reference import fingerprint_weights
from softpref.training.scoring import score_pairs
from softpref.world.language import score


class _Scored(ABC):
    """Turns scores into verdicts: the higher wins, equal ones and equal texts tie."""

    sees_order = False
    batch_size = 1000

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Yield every question with its answer."""
        for question in questions:
            if question.first == question.second:
                yield question, Answer("tie")
        different = [question for question in questions if question.first != question.second]
        for start in range(0, len(different), self.batch_size):
            batch = different[start : start + self.batch_size]
            for question, answer in zip(batch, self.answers(batch), strict=True):
                yield question, answer

    @abstractmethod
    def answers(self, batch: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions whose texts differ."""


_DOES_NOT_FIT = Answer(None, "does not fit the context")


def on_accelerator(model: Any) -> Any:
    """Move a model to the accelerator where there is one."""
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


def _by_score(difference: float) -> Answer:
    if difference != difference:
        return Answer(None, "score is NaN")
    return Answer("A" if difference > 0 else "B" if difference < 0 else "tie")


def _places(
    questions: Sequence[Question], ids: Sequence[Sequence[Sequence[int]]]
) -> Iterator[tuple[str, list[int]]]:
    """Yield where the token ids of each question stand, and the ids."""
    for question, parts in zip(questions, ids, strict=True):
        yield f"comparison {question.uid}", [token for part in parts for token in part]


class RewardModel(_Scored):
    """A sequence classifier of one output, on prompt and response as its chat template has them.

    Without a template plain text is prompt and response joined.

    Raises:
        UsageError: there is no such model, or it has several outputs.
    """

    def __init__(self, options: JudgeOptions) -> None:
        source = str(options.judge_model)
        model: Any = load_classifier(source, option="--judge_model")
        place = f"--judge_model {source}"
        self._tokenizer = read_tokenizer(source, place, trust_remote_code=False)
        require_finite_weights(model)
        if model.config.num_labels != 1:
            raise UsageError(
                f"--judge_model {source}: has {model.config.num_labels} outputs; a reward model "
                "has one."
            )
        # The reward is read at the last token that is not padding, which EOS must not be taken for.
        pad = self._tokenizer.pad_token_id
        self._pads = pad is not None and pad != self._tokenizer.eos_token_id
        model.config.pad_token_id = pad if self._pads else None
        self._model = on_accelerator(model.eval())
        self._longest = context_length(model)
        self.batch_size = options.judge_batch_size
        self.identity: Mapping[str, Any] = {
            "judge": "reward_model",
            "model": source,
            "weights": fingerprint_weights(model),
        }

    def answers(self, batch: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions whose texts differ."""
        texts = [
            [self._render(question, response) for response in (question.first, question.second)]
            for question in batch
        ]
        encoded = [[self._ids(text) for text in pair] for pair in texts]
        require_known_tokens(self._model, self._tokenizer, _places(batch, encoded))
        fits = [all(len(ids) <= self._longest for ids in pair) for pair in encoded]
        rewards = iter(self._rewards([text for pair, fit in zip(texts, fits, strict=True) if fit
                                      for text in pair]))  # fmt: skip
        return [_by_score(next(rewards) - next(rewards)) if fit else _DOES_NOT_FIT for fit in fits]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _rewards(self, texts: list[str]) -> list[float]:
        rewards: list[float] = []
        at_once = max(1, len(texts)) if self._pads else 1
        for start in range(0, len(texts), at_once):
            encoded = self._tokenizer(
                texts[start : start + at_once], return_tensors="pt", padding=self._pads,
                add_special_tokens=False,
            ).to(self._model.device)  # fmt: skip
            inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                rewards += self._model(**inputs).logits.float().flatten().tolist()
        return rewards

    def _render(self, question: Question, response: str) -> str:
        if self._tokenizer.chat_template is None:
            if not isinstance(question.prompt, str):
                raise UsageError(
                    f"--judge_model {self._tokenizer.name_or_path}: has no chat template, but the "
                    "prompts are conversations."
                )
            bos = self._tokenizer.bos_token or ""
            return f"{bos}{question.prompt}{response}{self._tokenizer.eos_token or ''}"
        prompt = question.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        reply = {"role": "assistant", "content": response}
        return str(self._tokenizer.apply_chat_template([*messages, reply], tokenize=False))


class ImplicitReward(_Scored):
    """The reward β log π/π_ref that a policy was aligned by; A wins where its margin h is above 0.

    Not a judge from outside: a policy likes what it was trained to write. Responses are cut at the
    end of the context.

    Raises:
        UsageError: a model cannot be loaded.
    """

    def __init__(self, options: JudgeOptions) -> None:
        policy, reference = str(options.judge_model), str(options.judge_reference)
        option = "--judge_reference"
        self._tokenizer = load_tokenizer(reference, trust_remote_code=False, option=option)
        self._policies = [
            on_accelerator(load_policy(path, trust_remote_code=False, option=option))
            for path, option in ((policy, "--judge_model"), (reference, option))
        ]
        for loaded in self._policies:
            require_sound(loaded)
        self._longest = min(map(context_length, self._policies))
        self._forward_size = options.judge_batch_size
        self.batch_size = 64 * options.judge_batch_size
        self.identity: Mapping[str, Any] = {
            "judge": "implicit_reward",
            "model": policy,
            "weights": [fingerprint_weights(policy) for policy in self._policies],
        }

    def answers(self, batch: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions whose texts differ."""
        tokenized: dict[int, TokenizedPair] = {}
        for i, question in enumerate(batch):
            first, second = (self._as(question, text) for text in (question.first, question.second))
            pair = {"prompt": question.prompt, "chosen": first, "rejected": second}
            with contextlib.suppress(RowError):
                tokenized[i] = tokenize_pair(pair, self._tokenizer, self._longest)
        if not tokenized:
            return [self._untokenized(question) for question in batch]
        asked = [batch[i] for i in tokenized]
        ids = [[getattr(pair, part) for part in PARTS] for pair in tokenized.values()]
        for loaded in self._policies:
            require_known_tokens(loaded, self._tokenizer, _places(asked, ids))
        pairs = Dataset.from_list(
            [{p: getattr(ids, p) for p in PARTS} for ids in tokenized.values()]
        )
        policy, reference = (self._differences(policy, pairs) for policy in self._policies)
        margins = dict(zip(tokenized, (policy - reference).tolist(), strict=True))
        return [
            _by_score(margins[i]) if i in margins else self._untokenized(question)
            for i, question in enumerate(batch)
        ]

    def _untokenized(self, question: Question) -> Answer:
        """Tell texts that are the same tokens, a tie, from those that do not fit."""
        first, second = (
            self._tokenizer(text)["input_ids"] for text in (question.first, question.second)
        )
        return Answer("tie") if first == second else _DOES_NOT_FIT

    def _as(self, question: Question, response: str) -> Any:
        if isinstance(question.prompt, str):
            return response
        return [{"role": "assistant", "content": response}]

    def _differences(self, policy: Any, pairs: Dataset) -> Tensor:
        """Return log π(first) − log π(second), (B,), nats."""
        scored = score_pairs(
            policy, pairs, ppl_scope="response", batch_size=self._forward_size, bf16=False,
            collate=make_batch, what="judging",
        )  # fmt: skip
        return scored.chosen_logp - scored.rejected_logp


class RightAnswers(_Scored):
    """The checker of the synthetic world: the larger share of symbols in place wins."""

    identity: Mapping[str, Any] = {"judge": "checker"}

    def answers(self, batch: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions whose texts differ."""
        try:
            return [
                _by_score(score(str(q.prompt), q.first) - score(str(q.prompt), q.second))
                for q in batch
            ]
        except ValueError as error:
            raise UsageError(f"--judge checker: {error}; name another judge.") from None
