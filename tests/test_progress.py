"""A log that is no terminal hears from a long pass every 30 seconds."""

from __future__ import annotations

import logging

import pytest

from softpref import progress
from softpref.data import make_batch
from softpref.models.scoring import Scorer
from softpref.progress import Progress
from tests.toy import toy_trainer


@pytest.fixture
def clock(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "softpref")
    now = [0.0]

    def tick(seconds):
        now[0] += seconds

    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return tick


def test_a_line_every_30_seconds_says_what_is_left(clock, caplog):
    with Progress("scoring", 100, "pair", done=20) as bar:
        for _ in range(8):
            clock(12)
            bar.update(10)
    assert caplog.messages == [
        "scoring: 50 of 100 pairs, about 60 seconds left",
        "scoring: 80 of 100 pairs, about 24 seconds left",
    ]


def test_a_quick_pass_and_other_processes_say_nothing(clock, caplog):
    with Progress("scoring", 2, "pair") as quick, Progress("a", 2, "pair", is_silent=True) as other:
        clock(29)
        quick.update()
        clock(60)
        other.update()
    assert caplog.messages == []


def test_a_terminal_has_a_bar_instead(clock, caplog, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("scoring", 2, "pair") as bar:
        clock(31)
        bar.update()
    assert caplog.messages == []


def test_scoring_counts_pairs(clock, caplog, tmp_path):
    trainer = toy_trainer(tmp_path, method="dpo")
    caplog.clear()

    def slow(rows):
        clock(31)
        return make_batch(rows)

    count = len(trainer.pairs)
    Scorer(trainer.policy, slow, batch_size=count - 1).measure(trainer.pairs, "labelling")
    assert caplog.messages == [
        f"labelling: {count - 1} of {count} pairs, about {31 / (count - 1):.0f} seconds left",
        f"labelling: {count} of {count} pairs, about 0 seconds left",
    ]
