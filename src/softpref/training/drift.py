"""Whether the processes that share a run's steps still hold the same numbers."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from softpref.algorithm.policy import trainable
from softpref.algorithm.ranks import DriftError, Ranks
from softpref.errors import UsageError
from softpref.training.teacher import Teacher

STEPS_BETWEEN = 50
"""Steps between two looks."""


def require_alike(ranks: Ranks, step: int, policy: nn.Module, teacher: Teacher | None) -> None:
    """Compare step and φ bit for bit, the policy by the sums of its trained tensors, float64.

    A shard is on one process alone, and has nothing to be compared with.

    Raises:
        UsageError: they have come apart.
    """
    if ranks.count == 1 or step % STEPS_BETWEEN:
        return
    held_by_all = [p.detach() for p in trainable(policy) if not isinstance(p, DTensor)]
    sums = [parameter.double().sum() for parameter in held_by_all]
    phi = list(teacher.meta_learner.state_dict().values()) if teacher else []
    try:
        ranks.require_alike("the step", [torch.tensor(step, device=ranks.device)])
        ranks.require_alike("the policy", [torch.stack(sums)] if sums else [])
        ranks.require_alike("the meta-learner", phi)
    except DriftError as error:
        raise UsageError(
            f"step {step + 1}: {error}. Look for a device that computes wrongly; checkpoints of "
            f"the {STEPS_BETWEEN} steps before may be wrong already."
        ) from None


def require_same_start(ranks: Ranks, what: str, told: str) -> None:
    """Compare what each process was told, before it decides how often they exchange something.

    Raises:
        UsageError: it is not the same.
    """
    digest = torch.tensor(list(hashlib.sha256(told.encode()).digest()), device=ranks.device)
    try:
        ranks.require_alike(what, [digest])
    except DriftError as error:
        raise UsageError(
            f"{error}: start all by the same command, on the same files and the same --output."
        ) from None
