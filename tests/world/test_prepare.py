"""A prepared world is whole or made again, and the checker compares with its SFT model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from softpref.world import prepare
from softpref.world.build import INFORMATIVE
from softpref.world.checker import Checker
from softpref.world.language import right_answer
from softpref.world.prepare import PreparedWorld, prepare_world

SMALL = replace(
    INFORMATIVE, sft_rows=100, train_pairs=20, clean_pairs=10, eval_pairs=10, test_prompts=30
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepare_world(SMALL, 3, tmp_path_factory.mktemp("world") / "w")


def test_a_whole_world_is_left_alone_and_a_half_made_one_made_again(world, monkeypatch):
    prompts, scores = world.test()
    assert len(prompts) == len(scores) == 30
    monkeypatch.setattr(prepare, "fine_tune_tiny", lambda *_: pytest.fail("made again"))
    assert prepare_world(SMALL, 3, world.home) == PreparedWorld(world.home, 3)
    monkeypatch.undo()
    before = (world.home / "train.jsonl").read_bytes()
    (world.home / "test.json").unlink()
    prepare_world(SMALL, 3, world.home)
    assert world.test() == (prompts, scores)
    assert (world.home / "train.jsonl").read_bytes() == before


def test_the_checker_knows_the_better_model(world, monkeypatch):
    numbers = Checker(world)(world.home / "sft")
    assert numbers["win_rate_low"] < 0.5 < numbers["win_rate_high"]
    assert numbers["score"] == pytest.approx(numbers["sft_score"], abs=0.1)
    monkeypatch.setattr(
        "softpref.world.prepare.drawing", lambda *_: lambda asked: [right_answer(p) for p in asked]
    )
    perfect = Checker(world)(world.home / "sft")
    assert perfect["score"] == 1
    assert perfect["win_rate"] == 1
