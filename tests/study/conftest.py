"""A world that is made and aligned in seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from softpref.study import presets
from softpref.study.presets import WorldPreset
from softpref.world.build import INFORMATIVE

SMALL = replace(
    INFORMATIVE, sft_rows=200, train_pairs=128, clean_pairs=12, eval_pairs=20, test_prompts=40
)


@pytest.fixture
def in_world(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "WORLDS", {"informative": SMALL})
    monkeypatch.setattr(presets, "LARGEST_CLEAN_SET", 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return WorldPreset("informative", tmp_path / "worlds")
