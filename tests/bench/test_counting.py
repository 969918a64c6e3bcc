"""What a step asks of the device: how it is counted, and the budget that it must keep."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from softpref.bench.benchmark import OLDEST_TRL
from softpref.bench.contestants import make_contestant
from softpref.bench.counting import StepCounts, count_step
from softpref.bench.workload import TUNINGS, ModelSize, Shape, Workload

# Widths do not count; depth does, against what a step costs beside its layers.
SIX_LAYERS = ModelSize(64, 16, 24, 6, 4, 2, tie_word_embeddings=False)
WORKLOAD = Workload(SIX_LAYERS, Shape(12, 6), "cpu", batches=1)
a, b = torch.rand(4, 3), torch.rand(3, 4)
places, mask = torch.tensor([2, 0]), torch.tensor([True, False, True, True])


@pytest.mark.parametrize(
    ("step", "operations", "waits"),
    [
        (lambda: a @ b, 1, 0),
        (lambda: a.T.reshape(12)[1:].detach(), 1, 0),  # the copy that reshape makes
        (lambda: torch.ops.aten._unsafe_view(a, [12]), 0, 0),
        (lambda: a.clone().add_(1).mul_(2), 3, 0),
        (lambda: torch._foreach_add([a, a.T, b], 1), 1, 0),
        (lambda: (a * b.T).sum().item(), 2, 1),
        (lambda: [float(a[0, 0]), bool(a[0, 0]), a.tolist(), a.cpu(), a.numpy()], 0, 5),
        (lambda: a[places], 1, 0),
        (lambda: a[mask], 1, 1),
        (lambda: a.masked_fill(mask[:, None], 0), 1, 0),
        (lambda: mask.nonzero(), 1, 1),
        (lambda: places.bincount(), 1, 1),
        (lambda: torch.equal(a, a), 0, 1),
    ],
)  # fmt: skip
def test_operations_and_waits_by_hand(step, operations, waits):
    assert count_step(step) == StepCounts(operations, waits)


def test_a_backward_pass_counts():
    weight = torch.rand(3, 4, requires_grad=True)
    loss = (a @ weight).sum()  # its backward pass: a one, expanded as a view, and one product
    assert count_step(loss.backward) == StepCounts(2, 0)


@pytest.mark.skipif(
    Version(version("trl")) < Version(OLDEST_TRL), reason=f"bench needs TRL {OLDEST_TRL}"
)
@pytest.mark.parametrize(("tuning", "most_of_dpo"), zip(TUNINGS, (2.3, 2.5), strict=True))
def test_a_step_keeps_its_budget(tuning, most_of_dpo, tmp_path):
    counts = {}
    for name in ("trl_best", "dpo", "mspo_m1/8"):
        contestant = make_contestant(name, WORKLOAD, tuning, tmp_path)
        contestant.step(0)  # φ's optimizer starts in it
        contestant.clear()
        counts[name] = count_step(partial(contestant.step, 0))
    trl, dpo, mspo = counts.values()
    assert dpo.operations <= trl.operations
    assert mspo.operations <= most_of_dpo * dpo.operations
    assert max(dpo.waits, mspo.waits) <= 4
