"""Lines of text in the place of printed dictionaries."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from transformers import PrinterCallback, ProgressCallback

from softpref.training import progress_lines
from softpref.training.progress_lines import ProgressLines, duration, show_progress_lines

ARGS = SimpleNamespace(disable_tqdm=True)
LINE = {
    "loss": 0.68412, "labels/mean": 0.61, "labels/below_half": 0.31, "grad_norm": 1.0,
    "rewards/accuracies": 0.5, "learning_rate": 1e-4, "epoch": 0.5,
}  # fmt: skip


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=210, is_world_process_zero=True)


@pytest.fixture
def lines(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "softpref")
    now = [0.0]
    monkeypatch.setattr(progress_lines, "monotonic", lambda: now[0])
    lines = ProgressLines()
    lines.on_train_begin(ARGS, state(0), None)
    now[0] = 8.0
    lines.on_step_end(ARGS, state(10), None)
    return lines


def test_numbers_are_aligned_and_have_their_units(lines, caplog):
    lines.on_log(ARGS, state(10), None, logs=LINE)
    lines.on_log(ARGS, state(16), None, logs=LINE | {"labels/below_half": 0.031})
    assert caplog.messages == [
        "step  10/210  loss 0.684  accuracy 50%  labels 0.61  doubted 31%  1.2 steps/s, 3 min left",
        "step  16/210  loss 0.684  accuracy 50%  labels 0.61  doubted  3%  2.0 steps/s, 97 s left",
    ]


def test_evaluations_and_the_end_have_lines_too(lines, caplog):
    lines.on_log(ARGS, state(2), None, logs=LINE)
    evaluated = {"eval_loss": 0.7, "eval_rewards/accuracies": 0.875, "epoch": 1}
    lines.on_log(ARGS, state(210), None, logs=evaluated)
    lines.on_log(ARGS, state(210), None, logs={"train_runtime": 200.0, "train_loss": 0.65})
    lines.on_train_end(ARGS, state(210), None)
    assert caplog.messages == [
        "step   2/210  loss 0.684  accuracy 50%  labels 0.61  doubted 31%  4.0 s/step, 14 min left",
        "step 210/210  evaluation  loss 0.700  accuracy 88%",
        "trained 210 steps in 3 min, mean loss 0.650",
    ]


def test_a_resumed_or_ended_run_says_the_steps_it_made(lines, caplog):
    lines.on_train_begin(ARGS, state(30), None)
    lines.on_log(ARGS, state(37), None, logs={"train_runtime": 20.0})
    assert caplog.messages == ["trained 7 steps in 20 s"]


def test_only_the_first_process_and_known_numbers_speak(lines, caplog):
    other = state(3)
    other.is_world_process_zero = False
    lines.on_log(ARGS, other, None, logs=LINE)
    lines.on_log(ARGS, state(3), None, logs={"epoch": 1.0})
    assert caplog.messages == []


def test_dictionaries_are_printed_no_more():
    calls = []
    trainer = SimpleNamespace(
        remove_callback=lambda of: calls.append(of), add_callback=lambda of: calls.append(type(of))
    )
    show_progress_lines(trainer)
    assert calls == [PrinterCallback, ProgressCallback, ProgressLines]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (9000, "2.5 h")]
)
def test_durations_have_units(seconds, text):
    assert duration(seconds) == text
