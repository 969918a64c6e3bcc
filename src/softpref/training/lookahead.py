"""The look-ahead's preconditioner, read off the policy's own optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from softpref.algorithm.policy import Gradient, trainable


def adamw_scales(optimizer: Any, policy: nn.Module) -> Gradient | None:
    """Return AdamW's 1 / (√v̂ + eps) from the step before, or None while there was none.

    v̂ is the bias-corrected second moment: constant in φ, so it multiplies the clean gradient in
    u_i as it does the look-ahead step. Neither momentum nor decay takes part.

    Args:
        optimizer: the policy's AdamW, as the trainer holds it.
        policy: the policy.
    """
    if not optimizer.state:
        return None
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    scales = []
    for parameter in trainable(policy):
        state, group = optimizer.state[parameter], groups[parameter]
        correction = 1 - group["betas"][1] ** float(state["step"])
        scales.append(1 / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"]))
    return tuple(scales)
