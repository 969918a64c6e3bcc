"""One step on the pairs of its whole effective batch, as a run's options have it.

Shapes: B pairs of the step, C clean pairs beside them, on all ranks. Every rank is given all of
them and takes its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from softpref.algorithm.bilevel import Update, move, mspo_step
from softpref.algorithm.gradients.engine import EngineChoice
from softpref.algorithm.gradients.jacobian import GraphPullback
from softpref.algorithm.labeller import Labeller
from softpref.algorithm.likelihood import Measured, PplScope
from softpref.algorithm.objective import Objective
from softpref.algorithm.rows import PairBatch
from softpref.data.batches import Collate, Pair, length_buckets
from softpref.training.teacher import Teacher


@dataclass(frozen=True)
class StepResult:
    """What a step came to.

    Attributes:
        update: where the policy is pulled, and by which labels; all B pairs', on every rank.
        index: (B,) each pair's position in its data set, in the order of `update`; on the host.
        meta_loss: L_meta of a step that taught, nats, shape ().
    """

    update: Update
    index: Tensor
    meta_loss: Tensor | None = None


@dataclass(frozen=True)
class StepRunner:
    """The steps of one run.

    Attributes:
        labeller: whose labels the policy follows.
        objective: what each step minimizes, whether it teaches or not.
        collate: makes a micro-batch of pairs.
        micro_batch: pairs in one micro-batch of this process.
        ppl_scope: which tokens count in PPLDiff.
    """

    labeller: Labeller
    objective: Objective
    collate: Collate
    micro_batch: int
    ppl_scope: PplScope

    def batches(self, pairs: Sequence[Pair]) -> list[PairBatch]:
        """Return this rank's pairs of one step as micro-batches of pairs of like length."""
        ranks = self.objective.ranks
        parts = length_buckets(pairs, self.micro_batch, ranks)
        return [self.collate(part).to(ranks.device) for part in parts]

    def plain(self, policy: nn.Module, pairs: Sequence[Pair]) -> StepResult:
        """Move by the labeller's labels, one micro-batch after the other."""
        batches = self.batches(pairs)
        pullbacks = (GraphPullback(policy, batch, self.ppl_scope) for batch in batches)
        held = sum(map(len, batches))
        update = move(pullbacks, self.labeller, self.objective, pairs=held)
        return self._whole(update, [batch.index for batch in batches], len(pairs))

    def taught(
        self,
        policy: nn.Module,
        pairs: Sequence[Pair],
        clean: Sequence[Pair],
        teacher: Teacher,
        engine: EngineChoice,
        lookahead_lr: float,
    ) -> StepResult:
        """Teach the meta-learner by the clean pairs' gradient at θ', then move by its labels."""
        batches = self.batches(pairs)
        jacobians = [engine.make_jacobian(policy, batch, self.ppl_scope) for batch in batches]
        update, meta_loss = mspo_step(
            policy,
            teacher.meta_learner,
            teacher.optimizer,
            jacobians,
            self.batches(clean),
            self.objective,
            lookahead_lr,
            engine.make_pullback,
        )
        return self._whole(update, [batch.index for batch in batches], len(pairs), meta_loss)

    def _whole(
        self, update: Update, index: Sequence[Tensor], pairs: int, meta_loss: Tensor | None = None
    ) -> StepResult:
        """Return a step with what every rank said of its share, unless each said all of it."""
        places, ranks = torch.cat(list(index)), self.objective.ranks
        if ranks.count == 1 or pairs < ranks.count:
            return StepResult(update, places, meta_loss)
        names, numbers = zip(*update.measured.columns().items(), strict=True)
        columns = [*numbers, update.soft_label, places.to(ranks.device)]
        *gathered, soft_label, places = ranks.gather(columns)
        measured = Measured(**dict(zip(names, gathered, strict=True)))
        update = replace(update, measured=measured, soft_label=soft_label)
        return StepResult(update, places.cpu(), meta_loss)
