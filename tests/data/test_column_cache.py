"""A cache that cannot be written costs time on the next run, and never this one."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaForSequenceClassification

import softpref
from softpref.data import column_cache, temporary
from softpref.data.column_cache import ColumnCache
from softpref.models import reference
from softpref.training.output import write_lines
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
from tests.judging.test_scored import saved as saved_model
from tests.toy import toy_pairs, toy_trainer

COLUMNS = {"a": torch.arange(3.0)}
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def is_full(*_, **__):
    raise FULL


def test_what_is_written_is_read_again(tmp_path):
    ColumnCache(str(tmp_path / "new" / "cache")).write("x", COLUMNS)
    found = ColumnCache(str(tmp_path / "new" / "cache")).read("x", ["a"], 3)
    assert torch.equal(found["a"], COLUMNS["a"])


def test_a_process_that_looks_for_leftovers_removes_no_file_that_is_written(tmp_path, monkeypatch):
    fsync = temporary.fsync

    def looked_for(path):
        temporary.collect_partials(tmp_path)
        fsync(path)

    monkeypatch.setattr(temporary, "fsync", looked_for)
    cache = ColumnCache(str(tmp_path))
    cache.write("x", COLUMNS)
    assert cache.read("x", ["a"], 3)


def no_directory(home, _):
    (home / "cache").write_text("a file in its place")


def read_only(_, monkeypatch):
    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(column_cache, "replacing", refuse)


def full(_, monkeypatch):
    monkeypatch.setattr(column_cache, "save", is_full)


@pytest.mark.parametrize("damage", [b"", b"x", b"half"])
def test_a_damaged_file_is_noticed(tmp_path, caplog, damage):
    cache = ColumnCache(str(tmp_path))
    assert cache.read("x", ["a"], 3) is None
    assert not caplog.messages
    cache.write("x", COLUMNS)
    path = tmp_path / "x.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] if damage == b"half" else whole[:-1] + damage if damage else damage)
    assert cache.read("x", ["a"], 3) is None
    assert caplog.messages == [f"warning: {path} is damaged: what it held is computed again"]
    path.write_bytes(whole)
    assert len(cache.read("x", ["a"])["a"]) == 3
    assert cache.read("x", ["a", "b"]) is cache.read("x", ["a"], 2) is None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(no_directory, "File exists"), (read_only, "Read-only"), (full, "No space left")],
)
def test_a_cache_that_cannot_be_written_is_told_once(tmp_path, monkeypatch, caplog, spoil, reason):
    spoil(tmp_path, monkeypatch)
    cache = ColumnCache(str(tmp_path / "cache"))
    for _ in range(2):
        cache.write("x", COLUMNS)
        assert cache.read("x", ["a"], 3) is None
    (told,) = caplog.messages
    assert told.startswith(f"warning: the cache {tmp_path}/cache cannot be written (")
    assert reason in told
    assert "--reference_cache" in told
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_run_trains_as_it_would_with_its_cache(tmp_path, monkeypatch, caplog):
    options = {"method": "dpo", "max_steps": 1}
    whole = toy_trainer(tmp_path / "whole", **options).pairs["ref_chosen_logp"][:]
    monkeypatch.setattr(column_cache, "save", is_full)
    monkeypatch.setattr(reference, "PART", 16)
    without = toy_trainer(tmp_path / "other", **options).pairs["ref_chosen_logp"][:]
    assert without == pytest.approx(whole, abs=1e-4)
    assert sum("cannot be written" in told for told in caplog.messages) == 1


def test_an_audit_has_one_cache_for_scores_and_opinions(tmp_path, monkeypatch, caplog):
    tiny_llama(make_tokenizer(), 0).save_pretrained(tmp_path / "sft")
    make_tokenizer().save_pretrained(tmp_path / "sft")
    write_lines(tmp_path / "data.jsonl", toy_pairs(20, flip_every=3))
    write_lines(tmp_path / "clean.jsonl", toy_pairs(12, seed=1))
    saved_model(tmp_path / "rm", LlamaForSequenceClassification, 0, num_labels=1)
    home = [str(tmp_path / name) for name in ("sft", "data.jsonl", "clean.jsonl")]
    options = {"reward_model": str(tmp_path / "rm"), "reference_cache": str(tmp_path / "mine")}
    softpref.audit(*home, **options)
    names = [path.name for path in (tmp_path / "mine").iterdir()]
    assert sorted(name.startswith("rewards-") for name in names) == [False, False, True]
    monkeypatch.setattr(column_cache, "save", is_full)
    options["reference_cache"] = str(tmp_path / "full")
    assert softpref.audit(*home, **options).pairs.num_rows == 20
    assert sum("cannot be written" in told for told in caplog.messages) == 1
    assert f"the cache {tmp_path}/full cannot" in caplog.text
