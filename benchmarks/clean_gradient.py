"""What the clean gradient at θ instead of θ' costs in accuracy: `--clean_gradient current`.

The relative error of dL_meta/dp̂ for several α, on a random Llama in float64, by LoRA and with all
weights, as a table in Markdown.

    python benchmarks/clean_gradient.py
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from softpref.algorithm.bilevel import Objective, clean_gradient, label_gradient, look_ahead
from softpref.algorithm.gradients.jacobian import GraphPullback, kept
from softpref.algorithm.objective import GEOMETRIC
from softpref.bench.benchmark import SHAPES, SMALL
from softpref.bench.contestants import make_contestant
from softpref.bench.workload import TUNINGS, Workload
from softpref.models.loading import Tuning
from softpref.training.trainer import MSPOTrainer

LOOKAHEAD_LRS = (5e-7, 5e-6, 1e-4, 1e-3)
SPREAD = 0.02  # off the start, where an adapter's B = 0 hides half of the gradient
BETA = 0.1


def errors(tuning: Tuning, home: Path) -> list[float]:
    """Return the relative error for each α."""
    workload = Workload(SMALL, SHAPES[0], "cpu")
    trainer = make_contestant("mspo_m1/8", workload, tuning, home).trainer
    assert isinstance(trainer, MSPOTrainer)
    policy, meta_learner = trainer.policy.double(), trainer.teacher.meta_learner.double()
    torch.manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += SPREAD * torch.randn_like(parameter)
    noisy, clean = (
        trainer.start.layout.collate(pairs.select(range(workload.pairs)).to_list())
        for pairs in (trainer.pairs, trainer.clean)
    )
    jacobians = [kept(policy, noisy, "response")]

    def by_label(gradient: tuple) -> Tensor:
        return label_gradient(meta_learner, jacobians, gradient, Objective(GEOMETRIC, BETA))

    at_theta = [GraphPullback(policy, clean, "response")]
    near = by_label(clean_gradient(at_theta, Objective(GEOMETRIC, BETA), pairs=workload.pairs)[1])
    found = []
    for lookahead_lr in LOOKAHEAD_LRS:
        _, gradient = look_ahead(
            policy, meta_learner, jacobians, [clean], Objective(GEOMETRIC, BETA), lookahead_lr
        )
        exact = by_label(gradient)
        found.append(float((near - exact).norm() / exact.norm()))
    return found


def main() -> None:
    """Measure and print."""
    print("| α | " + " | ".join(TUNINGS) + " |\n|---|" + "---|" * len(TUNINGS))
    with TemporaryDirectory() as home:
        columns = [errors(tuning, Path(home)) for tuning in TUNINGS]
    for lookahead_lr, *of_tunings in zip(LOOKAHEAD_LRS, *columns, strict=True):
        print(f"| {lookahead_lr:g} | " + " | ".join(f"{e:.1e}" for e in of_tunings) + " |")


if __name__ == "__main__":
    main()
