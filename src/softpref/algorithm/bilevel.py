"""The three steps of one MSPO update (section 3.2 and Algorithm 1): look ahead, teach, move.

Shapes: B pairs over all micro-batches of the step; a gradient is a tuple with one tensor for each
trainable parameter of the policy (see policy.py). Several ranks may share a step: B and means are
over the pairs of all, what has shape (B,) holds a rank's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from softpref.algorithm.gradients.engine import Engine, StepSize, choose_engine
from softpref.algorithm.gradients.forms import Direction, GradientForm, dense, parts, plus
from softpref.algorithm.gradients.jacobian import (
    GraphPullback,
    MakePullback,
    MarginJacobian,
    Pullback,
    tapped_gradients,
)
from softpref.algorithm.gradients.shards import norm_over_all, trains_shards
from softpref.algorithm.labeller import Constant, Labeller, MetaLearner
from softpref.algorithm.likelihood import Measured, PplScope, joined
from softpref.algorithm.objective import GEOMETRIC, Objective, PairLoss, offset_of
from softpref.algorithm.policy import evaluating, shifted
from softpref.algorithm.rows import PairBatch


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite; raised before θ or φ moves."""


@dataclass(frozen=True)
class Update:
    """Step 3's result: where the loss of Eq. 11 pulls the policy, and the labels it was made with.

    Attributes:
        gradient: ∇_θ L_main (Eq. 12), over all ranks; factors only where its pullbacks make them.
        loss: L_main, nats, shape (), over all ranks.
        measured: each pair's margin and PPLDiff, (B,).
        soft_label: the labels the gradient was made with, (B,).
    """

    gradient: Direction
    loss: Tensor
    measured: Measured
    soft_label: Tensor


def move(
    jacobians: Iterable[Pullback], labeller: Labeller, objective: Objective, *, pairs: int
) -> Update:
    """Return L_main and its gradient, labels from `labeller` (Eq. 7 and 11).

        L_main = (1/B) Σ_i ℓ(h_i, p̂_i),    ∇L_main = Jᵀ (∂ℓ/∂h) / B

    or with weights, target margins or another mean, as `Objective` has it. Takes the micro-batches
    one after the other, so that a generator needs to hold only one of them; `pairs` is how many
    they hold, B that over all ranks.
    """
    ranks = objective.ranks
    everywhere = ranks.total(pairs)
    gradient: list[GradientForm] = []
    parts_measured: list[Measured] = []
    soft_labels = []
    least, offset = torch.tensor(math.inf), torch.zeros(())
    for jacobian in jacobians:
        measured = jacobian.measure()  # runs a forward pass where none was kept
        with torch.no_grad():
            soft_label = labeller.label(measured).to(measured.margin)
            if objective.temperature is not None:
                found = objective.least(measured, soft_label)
                least = torch.minimum(found, least.to(found))
                before, offset = offset, offset_of(least)
                fade = (offset - before).clamp_max(0.0).exp()  # 1 as long as no loss is extreme
                gradient = [dense(form) * fade.to(dense(form)) for form in gradient]
            pull = objective.pull(measured, soft_label, offset) / everywhere
        accumulate(gradient, jacobian.vjp(pull))
        parts_measured.append(measured)
        soft_labels.append(soft_label)
        del jacobian  # its graph, before the next one is made
    assert parts_measured, "a step needs at least one micro-batch"
    whole, soft_label = Measured.concatenate(parts_measured), joined(soft_labels)
    mean = objective.terms(whole, soft_label, offset).sum() / everywhere
    if ranks.count > 1:
        *summed, mean = ranks.sum([*map(dense, gradient), mean])
        gradient = list(summed)
    if objective.temperature is not None:  # the gradient of −τ log of that mean
        (weight,) = ranks.sum([whole.filled("weight").sum()])
        mean = torch.where(weight > 0, mean, 1.0)  # where no pair counts, loss and gradient are 0
        gradient = [dense(form) / mean.to(dense(form)) for form in gradient]
        mean = objective.temperature * (offset - mean.log())
    return Update(tuple(gradient), mean, whole, soft_label)


def look_ahead(
    policy: nn.Module,
    meta_learner: MetaLearner,
    jacobians: Sequence[MarginJacobian],
    clean: Sequence[PairBatch],
    objective: Objective,
    lookahead_lr: float,
    make_pullback: MakePullback = GraphPullback,
) -> tuple[Tensor, Direction]:
    """Return L_meta, shape (), and the clean gradient g where the policy would go.

        θ' = θ − α ∇_θ L_main(θ; φ)                             (Eq. 7, 8)
        g  = ∇_θ' L_DPO(θ'; clean pairs)                        (Eq. 9)

    θ is bit for bit what it was when this returns.
    """
    virtual = move(jacobians, meta_learner, objective, pairs=sum(j.pairs for j in jacobians))
    of_noisy = total_norm(virtual.loss, *virtual.gradient)
    direction = tuple(map(dense, virtual.gradient))
    with shifted(policy, direction, lookahead_lr):
        del virtual, direction  # θ' is all that is needed of them
        at_clean = (make_pullback(policy, batch, "response") for batch in clean)
        loss, gradient = clean_gradient(at_clean, objective, pairs=sum(map(len, clean)))
    require_finite_norms(
        {
            "the loss of the noisy batch or its gradient": of_noisy,
            "the loss of the clean batch or its gradient": total_norm(loss, *gradient),
        }
    )
    return loss, gradient


def clean_gradient(
    pullbacks: Iterable[Pullback], objective: Objective, *, pairs: int
) -> tuple[Tensor, Direction]:
    """Return the mean DPO loss of trusted pairs (Eq. 2, 9), nats, and its gradient.

    Of the objective its β and ranks count: trusted labels are right, whatever the loss of others.
    """
    dpo = replace(objective, loss=GEOMETRIC, temperature=None)
    trusted = move(pullbacks, Constant(1.0), dpo, pairs=pairs)
    return trusted.loss, trusted.gradient


def label_gradient(
    meta_learner: MetaLearner,
    jacobians: Sequence[MarginJacobian],
    gradient: Direction,
    objective: Objective,
) -> Tensor:
    """Return dL_meta/dp̂_i without its factor α, shape (B,), for the clean gradient g.

    dL_meta/dp̂_i = −(α/B) [∂²ℓ/∂h∂p̂]_i ⟨∇h_i, g⟩          (Eq. 14, 15)
    """
    u = joined([jacobian.jvp(gradient) for jacobian in jacobians])
    measured = Measured.concatenate([j.measure() for j in jacobians])
    with torch.no_grad():
        soft_label = meta_learner.label(measured)
    mixed_derivative = objective.pull_by_label(measured, soft_label.to(measured.margin))
    return -mixed_derivative * u.to(mixed_derivative) / objective.ranks.total(len(u))


def mspo_step(
    policy: nn.Module,
    meta_learner: MetaLearner,
    meta_optimizer: torch.optim.Optimizer,
    jacobians: Sequence[MarginJacobian],
    clean: Sequence[PairBatch],
    objective: Objective,
    lookahead_lr: float,
    make_pullback: MakePullback = GraphPullback,
) -> tuple[Update, Tensor]:
    """Do one update of φ and return the policy's move made with the new φ, and L_meta.

    The meta-gradient's factor α is left out (docs/adr/0004): it places θ' but does not scale φ's
    step, so that a schedule does not weigh φ's history and AdamW's eps cannot swallow it.

    Raises:
        NonFiniteError: before φ or θ moves.
    """
    meta_loss, gradient = look_ahead(  # Eq. 7 to 9
        policy, meta_learner, jacobians, clean, objective, lookahead_lr, make_pullback
    )
    teach(meta_learner, meta_optimizer, jacobians, gradient, objective)  # Eq. 10
    del gradient  # as large as θ
    pairs = sum(j.pairs for j in jacobians)
    return move(jacobians, meta_learner, objective, pairs=pairs), meta_loss  # Eq. 11


def teach(
    meta_learner: MetaLearner,
    meta_optimizer: torch.optim.Optimizer,
    jacobians: Sequence[MarginJacobian],
    gradient: Direction,
    objective: Objective,
) -> None:
    """Update φ by the meta-gradient that a clean gradient g makes (Eq. 10), the same on all ranks.

    Raises:
        NonFiniteError: before φ moves.
    """
    by_label = label_gradient(meta_learner, jacobians, gradient, objective)
    soft_label = joined([meta_learner.label(j.measure()) for j in jacobians])
    soft_label.backward(by_label.to(soft_label))  # V's backward, seeded with dL/dp̂
    parameters = list(meta_learner.parameters())
    summed = objective.ranks.sum([cast(Tensor, p.grad) for p in parameters])
    try:
        require_finite("the meta-gradient", *summed)
        for p, gradient_of_p in zip(parameters, summed, strict=True):
            p.grad = gradient_of_p
        meta_optimizer.step()
    finally:
        meta_optimizer.zero_grad()


def meta_gradient(
    policy: nn.Module,
    meta_learner: MetaLearner,
    noisy: PairBatch | Sequence[PairBatch],
    clean: PairBatch | Sequence[PairBatch],
    *,
    beta: float,
    lookahead_lr: float,
    loss: PairLoss = GEOMETRIC,
    ppl_scope: PplScope = "response",
    engine: Engine = "auto",
) -> dict[str, Tensor]:
    """Return ∇_φ L_meta of Eq. 9, the factor α included, and change nothing.

    Args:
        policy: any causal language model of transformers, plain or PEFT, in any dtype; dropout is
            off while its gradients are taken.
        meta_learner: V(·; φ).
        noisy: the training pairs, or their micro-batches.
        clean: the trusted pairs, or their micro-batches.
        beta: β of the DPO loss, 1/nats.
        lookahead_lr: α of Eq. 8.
        loss: ℓ of the training pairs; the paper's is geometric.
        ppl_scope: which tokens count in PPLDiff.
        engine: how J is made; all are exact.

    Returns:
        φ's parameter names to gradients, in φ's own shapes.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
    """
    noisy = [noisy] if isinstance(noisy, PairBatch) else list(noisy)
    clean = [clean] if isinstance(clean, PairBatch) else clean
    with evaluating(policy):
        choice = choose_engine(engine, policy, noisy[0], StepSize.of(noisy))
        jacobians = [choice.make_jacobian(policy, batch, ppl_scope) for batch in noisy]
        objective = Objective(loss, beta)
        _, gradient = look_ahead(
            policy, meta_learner, jacobians, clean, objective, lookahead_lr, choice.make_pullback
        )
        by_label = label_gradient(meta_learner, jacobians, gradient, objective)
    names, parameters = zip(*meta_learner.named_parameters(), strict=True)
    soft_label = joined([meta_learner.label(j.measure()) for j in jacobians])
    gradients = torch.autograd.grad(
        soft_label, parameters, (lookahead_lr * by_label).to(soft_label)
    )
    require_finite("the meta-gradient", *gradients)
    return dict(zip(names, gradients, strict=True))


def accumulate(total: list[GradientForm], part: Direction) -> None:
    """Add a gradient to `total`, empty at first, tensor by tensor: θ's size is held twice only."""
    for i, held in enumerate(part):
        total[i : i + 1] = [plus(total[i], held) if i < len(total) else held]


def require_finite(what: str, *held: GradientForm) -> None:
    """Raise NonFiniteError unless the norm of all, and so each entry, is finite."""
    require_finite_norms({what: total_norm(*held)})


def total_norm(*held: GradientForm) -> Tensor:
    """Return the norm of all entries, shape (), without a wait for it.

    It is not finite if an entry is not, or is too large to be squared, as AdamW will.
    """
    return norm_over_all([part for each in held for part in parts(each)])


def require_finite_norms(norms: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError for the first whose norm is not finite; waits for the device once.

    Several at once, so that a step does not wait for each.
    """
    for what, norm in zip(norms, torch.stack(list(norms.values())).tolist(), strict=True):
        if not math.isfinite(norm):
            raise NonFiniteError(f"{what} is not finite")


def non_finite_pairs(
    policy: nn.Module, batches: Sequence[PairBatch], ppl_scope: PplScope
) -> list[int]:
    """Return the `index` of every pair whose own margin or gradient is not finite."""
    culprits = []
    for batch in batches:
        for pair in batch.single_pairs():
            if not _is_finite(policy, pair, ppl_scope):
                culprits.append(int(pair.index))
    return culprits


def _is_finite(policy: nn.Module, pair: PairBatch, ppl_scope: PplScope) -> bool:
    if trains_shards(policy):  # whose gradients are summed over the processes, and of other pairs
        found = [torch.ones((), dtype=torch.bool, device=pair.input_ids.device)]

        def look(_: nn.Parameter, gradient: Tensor) -> None:
            found.append(gradient.isfinite().all())

        one = torch.ones(1, device=pair.input_ids.device)
        margin = tapped_gradients(policy, pair, ppl_scope, one, look).margin
        return bool(torch.stack([*found, margin.isfinite().all()]).all())
    jacobian = GraphPullback(policy, pair, ppl_scope)
    margin = jacobian.measure().margin
    numbers = (margin, *jacobian.vjp(torch.ones_like(margin)))
    return all(bool(t.isfinite().all()) for t in numbers)
