"""`--report_to`: noise rate, labels and learned map in real trackers, and missing packages."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from softpref.algorithm.labeller import MetaLearner
from softpref.algorithm.signals import MARGIN, PPL_DIFF
from softpref.errors import UsageError
from softpref.trackers import TRACKERS, chosen_trackers
from softpref.training.tracking import LABELS, MAP, RATE, LabelTracking, map_picture
from tests.toy import toy_config, toy_trainer


def test_missing_packages_and_unknown_trackers_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"--report_to wandb needs the wandb .*pip install wandb\."
    ):
        chosen_trackers("wandb")
    with pytest.raises(UsageError, match="^report_to trackio needs the trackio package"):
        toy_config(tmp_path, report_to=["trackio"])
    with pytest.raises(UsageError, match="--report_to tensorbord: .*did you mean 'tensorboard'"):
        chosen_trackers(["none", "tensorbord"])
    assert chosen_trackers(None) == chosen_trackers("none") == []


def test_a_folder_that_is_called_like_a_package_is_none(monkeypatch, tmp_path):
    """W&B leaves one behind where it ran."""
    (tmp_path / "no_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TRACKERS, "mlflow", ("no_package",))
    with pytest.raises(UsageError, match="needs the no_package package"):
        chosen_trackers("mlflow")


def test_tensorboard_gets_noise_rate_histogram_and_map(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = toy_trainer(tmp_path, report_to=["tensorboard"], max_steps=2)
    trainer.train()
    (events,) = (tmp_path / "logs").rglob("events.*")
    read = EventAccumulator(str(events), {"histograms": 0, "images": 0}).Reload()
    (rate,) = read.Scalars(RATE)
    assert rate.value == pytest.approx(trainer.start.noise.expected)
    assert "train/labels/mean" in read.Tags()["scalars"]
    assert [of.step for of in read.Histograms(LABELS)] == [1, 2]
    labels = trainer.history.tensors()
    last = labels["soft_label"][labels["step"] == 2]
    histogram = read.Histograms(LABELS)[1].histogram_value
    assert histogram.num == len(last)
    assert histogram.sum == pytest.approx(float(last.sum()), rel=1e-5)
    assert [of.step for of in read.Images(MAP)] == [1, 2]


def test_wandb_takes_what_is_logged(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = wandb.init(project="test", dir=str(tmp_path))
    logged = []
    log = run.log
    monkeypatch.setattr(wandb, "log", lambda values: (logged.append(values), log(values)))
    track(["wandb"])
    run.finish()
    check(logged)
    assert list(tmp_path.rglob("media/images/**/*.png"))


def test_trackio_is_logged_to_likewise(monkeypatch):
    logged = []
    fake = SimpleNamespace(log=logged.append, Histogram=np.asarray, Image=np.asarray)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    track(["trackio"])
    check(logged)
    assert logged[1][LABELS].tolist() == [0.25, 0.75]


def track(report_to) -> None:
    """Log the beginning and one line of a run of two pairs."""
    history = {"soft_label": torch.tensor([0.25, 0.75]), "step": torch.tensor([1, 1])}
    trainer = SimpleNamespace(
        start=SimpleNamespace(noise=SimpleNamespace(expected=0.3)),
        history=SimpleNamespace(tensors=lambda: history),
        teacher=SimpleNamespace(meta_learner=MetaLearner(4, (PPL_DIFF, MARGIN))),
        callback_handler=SimpleNamespace(callbacks=[]),
    )
    tracking, args = LabelTracking(trainer), SimpleNamespace(report_to=report_to)
    for step, logs in ((0, None), (1, {"loss": 1.0}), (1, {"eval_loss": 1.0})):
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        if logs is None:
            tracking.on_train_begin(args, state, None)
        else:
            tracking.on_log(args, state, None, logs=logs)


def check(logged) -> None:
    assert logged[0] == {RATE: 0.3, "train/global_step": 0}
    assert set(logged[1]) == {LABELS, MAP, "train/global_step"}
    assert len(logged) == 2


def test_the_map_shows_the_soft_label_by_the_first_signal():
    meta_learner = MetaLearner(8)
    low = map_picture(meta_learner)
    assert low.shape[-1] == 3
    assert low.dtype == np.uint8
    with torch.no_grad():
        meta_learner.layers[-1].bias += 3
    assert (low != map_picture(meta_learner)).any()
