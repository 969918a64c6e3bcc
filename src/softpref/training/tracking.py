"""What trackers get of an alignment run beside its metrics: noise rate, labels, learned map.

Metrics reach every tracker through transformers' callbacks. TensorBoard, W&B and trackio also get
the noise rate, a histogram of the soft labels since the last log line, and a picture of what the
meta-learner has learned.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from softpref.algorithm.labeller import MetaLearner

if TYPE_CHECKING:
    from softpref.training.trainer import MSPOTrainer

RATE, LABELS, MAP = "train/noise_rate", "labels/soft_label", "labels/learned_map"
WITH_MEDIA = ("wandb", "trackio")
"""Trackers whose modules have `log`, `Histogram` and `Image`, as in W&B."""
SPREAD = 3.0
"""Standard deviations of the first signal on each side that the map shows."""


class LabelTracking(TrainerCallback):
    """Logs noise rate, labels and learned map to the trackers of `report_to`."""

    def __init__(self, trainer: MSPOTrainer) -> None:
        self._trainer = trainer
        self._last_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log the noise rate that the run assumes, if it has one."""
        self._last_step = state.global_step
        noise = self._trainer.start.noise
        if noise is None or not state.is_world_process_zero:
            return
        if writer := self._tensorboard():
            writer.add_scalar(RATE, noise.expected, state.global_step)
        for module in self._media(args):
            module.log({RATE: noise.expected, "train/global_step": state.global_step})

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Log the labels since the last line, and the map as it is now."""
        if not (logs and "loss" in logs and state.is_world_process_zero):
            return
        writer, modules = self._tensorboard(), self._media(args)
        history = self._trainer.history.tensors()
        labels = history["soft_label"][history["step"] > self._last_step].numpy()
        self._last_step = state.global_step
        if not (len(labels) and (writer or modules)):
            return
        teacher = self._trainer.teacher
        picture = map_picture(teacher.meta_learner) if teacher else None
        if writer:
            writer.add_histogram(LABELS, labels, state.global_step)
            if picture is not None:
                writer.add_image(MAP, picture, state.global_step, dataformats="HWC")
        for module in modules:
            media = {LABELS: module.Histogram(labels)}
            if picture is not None:
                media[MAP] = module.Image(picture)
            module.log(media | {"train/global_step": state.global_step})

    def _tensorboard(self) -> Any:
        """Return the writer of transformers' callback; None if there is none."""
        callbacks = self._trainer.callback_handler.callbacks
        found = [of.tb_writer for of in callbacks if isinstance(of, TensorBoardCallback)]
        return found[0] if found else None

    def _media(self, args: TrainingArguments) -> list[Any]:
        names = [name for name in WITH_MEDIA if name in (args.report_to or ())]
        return [importlib.import_module(name) for name in names]


def map_picture(meta_learner: MetaLearner) -> Any:
    """Return a picture of the soft label by the first signal, the others at their mean.

    Returns:
        An array (height, width, 3) of bytes.
    """
    # Every run imports this module, and few have a tracker.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mean, deviation = meta_learner.mean, meta_learner.deviation
    signals = mean.repeat(200, 1)
    signals[:, 0] += torch.linspace(-SPREAD, SPREAD, 200).to(mean) * deviation[0]
    with torch.no_grad():
        label = meta_learner(signals)
    figure = Figure(figsize=(5, 3), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    axes.plot(signals[:, 0].cpu(), label.cpu(), color="black")
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(ylim=(-0.03, 1.03), xlabel=meta_learner.signals[0].name, ylabel="soft label")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
