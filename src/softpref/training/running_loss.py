"""The sums behind `loss` and `train_loss`, which transformers starts anew with every process."""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from softpref.algorithm.ranks import Ranks
from softpref.training.states import JSON

SUMS = ("_total_loss_scalar", "_tr_loss", "_globalstep_last_logged")
"""The loss up to the last log line and since then, both summed over steps; that line's step."""


def running_loss(trainer: Trainer, ranks: Ranks) -> dict[str, JSON]:
    """Return the sums as they are between two steps, their mean over the ranks."""
    sums = torch.tensor([float(getattr(trainer, name, 0.0)) for name in SUMS], dtype=torch.float64)
    (total,) = ranks.sum([sums.to(ranks.device)])
    return dict(zip(SUMS, (total / ranks.count).tolist(), strict=True))


class ResumedLoss(TrainerCallback):
    """Puts the sums of an interrupted run back, once transformers has set its own to 0.

    Attributes:
        before: `running_loss` of the checkpoint; None in a run that resumes from none.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.before: Any = None

    def mean(self, steps: int) -> float:
        """Return `train_loss` of a run of which no step is left; 0 where the sums are unknown."""
        total, since = (self.before[name] for name in SUMS[:2]) if self.before else (0.0, 0.0)
        return (total + since) / steps

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Put them back."""
        if self.before is None:
            return
        total, since, last_logged = (self.before[name] for name in SUMS)
        self._trainer._total_loss_scalar = total
        self._trainer._tr_loss = torch.tensor(since, device=args.device)
        self._trainer._globalstep_last_logged = int(last_logged)
        self._trainer._initial_global_step = 0  # the sums are of all steps
