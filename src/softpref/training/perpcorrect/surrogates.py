"""PerpCorrect's surrogates: copies of the policy that are trained on the surest pairs.

PPLDiff of every round is kept on disk, as reference log-probs are, so that a resumed run comes to
the same labels, on a GPU too, without training a surrogate.

Shapes: n noisy pairs, in the order of their data set.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from softpref.algorithm.bilevel import require_finite
from softpref.algorithm.gradients.forms import dense
from softpref.algorithm.labeller import AsGiven
from softpref.algorithm.objective import Objective
from softpref.algorithm.policy import trainable
from softpref.algorithm.ranks import Ranks
from softpref.data.batches import Collate
from softpref.data.column_cache import ColumnCache
from softpref.models.layout import choose_layout, longest_pairs
from softpref.models.loading import make_trainable
from softpref.models.recompute import checkpoint_activations
from softpref.models.reference import fingerprint_tokens
from softpref.models.scoring import Scorer, mixed_precision
from softpref.progress import Progress
from softpref.training.config import MSPOConfig
from softpref.training.preparation import Prepared
from softpref.training.step import StepRunner

ROUNDS = 6
MORE_EACH_ROUND = 0.02  # share of the noisy pairs
EPOCHS = 3
READ = (
    "beta", "learning_rate", "max_grad_norm", "seed", "bf16", "tuning",
    "per_device_train_batch_size", "gradient_accumulation_steps",
    "lora_r", "lora_alpha", "lora_target_modules",
)  # fmt: skip


class Surrogates:
    """Makes surrogates, trains them, and keeps on disk what they say.

    Args:
        policy: the policy before its first step and before a fresh adapter; left as it is.
        prepared: all sets, with reference log-probs.
        args: the run's options.
        adapter: what a surrogate trains, where the run trains an adapter of its own.
        policy_fingerprint: `fingerprint_weights(policy)`.
        cache: where PPLDiff of every round is kept.
    """

    def __init__(
        self,
        policy: nn.Module,
        prepared: Prepared,
        args: MSPOConfig,
        adapter: PeftConfig | None,
        policy_fingerprint: str,
        cache: ColumnCache,
    ) -> None:
        self._policy, self._args, self._adapter = policy, args, adapter
        self.pairs = len(prepared.train)
        self._noisy, self._clean = prepared.train, cast(Dataset, prepared.clean)
        self._probe = longest_pairs(self._noisy, self._clean)
        made_from = [
            fingerprint_tokens(self._noisy),
            fingerprint_tokens(self._clean),
            policy_fingerprint,
            {name: getattr(args, name) for name in READ},
            adapter and adapter.to_dict(),
            [ROUNDS, MORE_EACH_ROUND, EPOCHS],
        ]
        text = json.dumps(made_from, sort_keys=True, default=_plain)
        self._kept_as = f"perpcorrect-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
        self._cache = cache

    def ppl_diff(self, number: int, believed: list[int], doubted: list[int]) -> Tensor:
        """Return the noisy pairs' PPLDiff under this round's surrogate, (n,), nats per token.

        Args:
            number: the round.
            believed: the noisy pairs to train on as given, beside the clean ones.
            doubted: those to train on reversed.

        Raises:
            NonFiniteError: the surrogate's loss, gradient or PPLDiff is not finite.
        """
        name = f"{self._kept_as}-{number}"
        known = self._cache.read(name, ["ppl_diff"], len(self._noisy))
        if known is not None:
            return known["ppl_diff"]
        surrogate, collate = self._fresh()
        reversed_ = self._noisy.select(doubted).to_list()
        pairs = [
            *self._clean.to_list(),
            *self._noisy.select(believed).to_list(),
            *(pair | {"given_label": 0.0} for pair in reversed_),
        ]
        self._train(surrogate, pairs, collate, f"surrogate {number}")
        scorer = Scorer(
            surrogate, collate, "sequence", self._args.per_device_eval_batch_size, self._args.bf16
        )
        ppl_diff = scorer.measure(self._noisy, f"PPLDiff under surrogate {number}").ppl_diff
        require_finite("its PPLDiff", ppl_diff)
        self._cache.write(name, {"ppl_diff": ppl_diff})
        return ppl_diff

    def _fresh(self) -> tuple[nn.Module, Collate]:
        """Return a copy of the policy, ready to train, and how its batches are made."""
        args = self._args
        # The run's own adapter must come out as it would without surrogates before it.
        with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
            torch.manual_seed(args.seed)
            surrogate = make_trainable(
                copy.deepcopy(self._policy), args.tuning, copy.deepcopy(self._adapter)
            )
        if args.activation_checkpointing:
            checkpoint_activations(surrogate)
        layout = choose_layout(args.resolved_layout(), surrogate, self._probe)
        return surrogate, layout.apply(surrogate)

    def _train(
        self, surrogate: nn.Module, pairs: list[dict[str, Any]], collate: Collate, what: str
    ) -> None:
        """Train by DPO on the pairs, each as its `given_label` says, 1 where it has none."""
        args = self._args
        ranks = Ranks(device=args.device)
        objective = Objective(args.resolved_method().loss, args.beta, ranks)
        size = args.per_device_train_batch_size
        steps = StepRunner(AsGiven(1.0), objective, collate, size, args.ppl_scope)
        parameters = trainable(surrogate)
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        total = EPOCHS * math.ceil(len(pairs) / size)
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, 0, total)
        generator = torch.Generator().manual_seed(args.seed)
        surrogate.train()
        with (
            _forward_in_mixed_precision(surrogate, args.device, args.bf16),
            Progress(what, total, "step") as bar,
        ):
            for _ in range(EPOCHS):
                for positions in torch.randperm(len(pairs), generator=generator).split(size):
                    update = steps.plain(surrogate, [pairs[i] for i in positions.tolist()]).update
                    require_finite("its loss or the gradient", update.loss, *update.gradient)
                    for parameter, gradient in zip(parameters, update.gradient, strict=True):
                        parameter.grad = dense(gradient).to(parameter)
                    if args.max_grad_norm:
                        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                    optimizer.step()
                    schedule.step()
                    bar.update()


@contextmanager
def _forward_in_mixed_precision(surrogate: Any, device: torch.device, bf16: bool) -> Iterator[None]:
    """Put autocast around the forward passes alone inside the block, as accelerate does it.

    Afterwards the surrogate no longer refers to itself, so that its memory is free at once.
    """
    if not bf16:
        yield
        return
    surrogate.forward = mixed_precision(device, bf16)(surrogate.forward)
    try:
        yield
    finally:
        del surrogate.forward


def _plain(value: Any) -> Any:
    """Return a JSON value for an entry of an adapter's config that JSON does not know."""
    return sorted(value) if isinstance(value, set) else str(value)
