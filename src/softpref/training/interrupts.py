"""What a run does when it is told to end, has no step left, or meets one that is not finite."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from softpref.algorithm.bilevel import NonFiniteError, require_finite
from softpref.algorithm.ranks import Ranks
from softpref.errors import UsageError

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM ended."""

logger = logging.getLogger(__name__)


class SaveOnTerm(TrainerCallback):
    """Saves after the step under way and ends training once SIGTERM has come.

    A second SIGTERM ends the process at once, unless a launcher started it. Ranks end after the
    same step, whichever of them the signal reached first.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.was_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM for a request while training; elsewhere than in the main thread, do not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.was_asked = True
        # A launcher hands on to its processes what a scheduler has told them already.
        again = signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL
        signal.signal(signal.SIGTERM, again)
        logger.warning("SIGTERM: saving after this step")

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and for the end."""
        self.was_asked = self._ranks.any(flag=self.was_asked)
        if self.was_asked:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class NoStepLeft(Exception):  # noqa: N818
    """The checkpoint is of the last step."""


class EndAtLastStep(TrainerCallback):
    """Keeps a resumed run out of the loop where nothing is left: it would take one step more."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave, once all that a checkpoint holds has been restored.

        Raises:
            NoStepLeft: always where no step is left.
        """
        if state.global_step >= state.max_steps:
            raise NoStepLeft


class FiniteWeights(TrainerCallback):
    """Ends a run whose optimizer made weights that are not finite, before they are saved.

    Args:
        trained: returns all that optimizers move.
    """

    def __init__(self, trained: Callable[[], Sequence[Tensor]]) -> None:
        self._trained = trained

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Look at the weights.

        Raises:
            UsageError: they are not finite.
        """
        try:
            require_finite("what the optimizer made of the weights", *self._trained())
        except NonFiniteError as error:
            raise UsageError(
                f"step {state.global_step + 1}: {error}. It is not saved; the checkpoints before "
                "it stand. Lower the learning rates, with a new --output."
            ) from error


class SkippedSteps:
    """Counts steps that were not taken because something in them was not finite.

    Attributes:
        count: how many.
        last: the latest of them, counted from 1; 0 where there is none.

    Args:
        limit: how many a run may have; one more ends it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.count = 0
        self.last = 0

    def skip(self, step: int, why: Exception, culprits: Sequence[str]) -> None:
        """Say which pairs did it.

        Raises:
            UsageError: the limit is passed.
        """
        self.count += 1
        blame = "No single pair does it: lower the rates."
        if culprits:
            blame = f"Look at the pairs {', '.join(culprits[:10])}."
        self.last = step
        said = f"step {step}: {why}. The policy was not moved. {blame}"
        if self.count > self._limit:
            raise UsageError(
                f"{said} --max_skipped_steps {self._limit} allows no further such step."
            ) from why
        logger.warning(
            "warning: %s Such steps so far: %d, at most %d", said, self.count, self._limit
        )
