"""Activation checkpointing by either of its names, and what older libraries lack."""

from __future__ import annotations

import importlib.util

import pytest

from softpref.bench.benchmark import BenchOptions, run_bench
from softpref.errors import UsageError
from softpref.models.recompute import checkpoint_activations
from softpref.training.config import MSPOConfig
from softpref.training.sft import SFTOptions
from tests.tiny import tiny_model
from tests.toy import toy_config, toy_trainer

NAMES = ("activation_checkpointing", "gradient_checkpointing")


@pytest.mark.parametrize("options", [MSPOConfig, SFTOptions])
@pytest.mark.parametrize("asked", [*NAMES, None])
def test_either_name_asks_for_it_and_neither_does_not(asked, options, tmp_path):
    made = options(output_dir=str(tmp_path), **({asked: True} if asked else {}))
    assert [bool(getattr(made, name)) for name in NAMES] == [bool(asked)] * 2


@pytest.mark.parametrize("name", NAMES)
def test_a_run_recomputes_under_either_name(name, tmp_path):
    trainer = toy_trainer(tmp_path, tuning="lora", max_steps=1, **{name: True})
    trainer.train()
    layers = trainer.policy.get_base_model().model.layers
    assert all(layer.gradient_checkpointing for layer in layers)


def test_a_policy_is_made_to_recompute():
    policy = tiny_model()
    checkpoint_activations(policy)
    assert all(layer.gradient_checkpointing for layer in policy.model.layers)


def test_shards_are_refused_where_libraries_are_too_old(tmp_path, monkeypatch):
    monkeypatch.setattr("softpref.models.sharding.can_shard", lambda: False)
    with pytest.raises(UsageError, match=r"shard needs transformers 5.19 and torch 2.13"):
        toy_config(tmp_path, shard=True, tuning="lora")


def test_what_needs_a_package_that_is_missing_names_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "trl" else found(name, *a)
    )
    with pytest.raises(UsageError, match=r"needs the trl package: pip install 'softpref\[sft\]'"):
        run_bench(BenchOptions())
