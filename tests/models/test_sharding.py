"""What goes with a sharded base, as one process can tell; `tests/distributed` shards one."""

from __future__ import annotations

import pytest
import torch

from softpref.errors import UsageError
from softpref.models.sharding import can_shard, freeze_base_shards, require_even_head
from softpref.training.config import MSPOConfig
from tests.tiny import tiny_model
from tests.toy import toy_config

pytestmark = pytest.mark.skipif(not can_shard(), reason="needs transformers 5.19 and torch 2.13")


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(MSPOConfig, "world_size", 2)


def test_shards_need_several_processes(tmp_path):
    with pytest.raises(UsageError, match="shard needs several processes: start them by"):
        toy_config(tmp_path, tuning="lora", shard=True)


def test_an_engine_that_goes_back_twice_is_refused(tmp_path, two_processes):
    with pytest.raises(UsageError, match='^engine="double_backward": shard .*; choose engine="'):
        toy_config(tmp_path, tuning="lora", shard=True, engine="double_backward")


def test_a_whole_model_is_not_taken_for_a_sharded_one():
    with pytest.raises(UsageError, match="load yours with distributed_config"):
        freeze_base_shards(tiny_model(dtype=torch.float32), 2)


def test_pairs_gradients_are_not_kept_whole_beside_trained_shards(tmp_path, two_processes):
    with pytest.raises(UsageError, match='engine="kept": with tuning="full" shard .*"auto"'):
        toy_config(tmp_path, tuning="full", shard=True, engine="kept")


def test_a_tied_head_of_uneven_shards_is_refused():
    tied = tiny_model(dtype=torch.float32, tie_word_embeddings=True, vocab_size=35)
    with pytest.raises(UsageError, match=r"35 rows do not make 2 equal shards: start a number"):
        require_even_head(tied, 2)
    require_even_head(tied, 5)
    require_even_head(tiny_model(dtype=torch.float32, vocab_size=35), 2)
