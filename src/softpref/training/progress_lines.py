"""Progress of a training run as lines of text, instead of transformers' printed dictionaries."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import monotonic
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState

logger = logging.getLogger(__name__)

TRAINING_PARTS = (
    ("loss", "loss {:.3f}"),
    ("mean_token_accuracy", "token accuracy {:3.0%}"),
    ("rewards/accuracies", "accuracy {:3.0%}"),
    ("labels/mean", "labels {:.2f}"),
    ("labels/below_half", "doubted {:3.0%}"),
    ("labels/auroc", "label AUROC {:.3f}"),
    ("meta/loss", "clean loss {:.3f}"),
)
"""What a training line shows, by the name in the log; doubted are soft labels below one half."""
EVALUATION_PARTS = (
    ("eval_loss", "loss {:.3f}"),
    ("eval_rewards/accuracies", "accuracy {:3.0%}"),
    ("eval_mean_token_accuracy", "token accuracy {:3.0%}"),
    ("eval_rewards/margins", "reward margin {:.3f}"),
)


def show_progress_lines(trainer: Trainer) -> None:
    """Log a trainer's progress as lines, with a bar on a terminal."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLines())


class ProgressLines(TrainerCallback):
    """Logs a line for each of the trainer's log entries."""

    def __init__(self) -> None:
        self._start = self._first_step = 0.0
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock and the bar."""
        self._start, self._first_step = monotonic(), state.global_step
        is_off = args.disable_tqdm or not state.is_world_process_zero or None
        steps = {"total": state.max_steps, "initial": state.global_step, "unit": "step"}
        self._bar = tqdm(desc="training", leave=False, disable=is_off, **steps)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Log a training or evaluation line, or the summary at the end."""
        if not (logs and state.is_world_process_zero):
            return
        width = len(str(state.max_steps))
        step = f"step {state.global_step:{width}}/{state.max_steps}"
        if "train_runtime" in logs:
            seconds = duration(logs["train_runtime"])
            mean = f", mean loss {logs['train_loss']:.3f}" if "train_loss" in logs else ""
            done = state.global_step - self._first_step
            self._say(f"trained {done} steps in {seconds}{mean}")
        elif "eval_loss" in logs:
            self._say("  ".join([f"{step}  evaluation", *_parts(EVALUATION_PARTS, logs)]))
        elif parts := _parts(TRAINING_PARTS, logs):
            self._say("  ".join([step, *parts, *self._speed(state)]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the bar; a run of which no step was left has none."""
        if self._bar is not None:
            self._bar.close()

    def _speed(self, state: TrainerState) -> list[str]:
        done = state.global_step - self._first_step
        seconds = monotonic() - self._start
        if not (done and seconds):
            return []
        left = duration(seconds / done * (state.max_steps - state.global_step))
        rate = done / seconds
        speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        return [f"{speed}, {left} left"]

    def _say(self, text: str) -> None:
        with tqdm.external_write_mode():  # takes the bar away while the line is printed
            logger.info("%s", text)


def duration(seconds: float) -> str:
    """Return a duration as text, with its unit."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _parts(shown: tuple[tuple[str, str], ...], logs: Mapping[str, Any]) -> list[str]:
    return [form.format(float(logs[name])) for name, form in shown if name in logs]
