"""What the runs of these tests start from."""

from __future__ import annotations

import pytest
import torch

from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model
from tests.toy import toy_pairs


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A model, training and clean pairs, in a directory that is the current one."""
    tiny_model(dtype=torch.float32, attention="sdpa").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    toy_pairs(44, flip_every=3).to_json(tmp_path / "train.jsonl")
    toy_pairs(16, 1).to_json(tmp_path / "clean.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
