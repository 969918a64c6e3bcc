"""Every file that a command leaves is of an open format, and none is a pickle."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from softpref.cli import main
from softpref.world.language import make_tokenizer
from tests.judging.server import Script, serving
from tests.safe_files import assert_safe_files
from tests.tiny import tiny_model
from tests.toy import toy_pairs

SETTINGS = ["--disable-tqdm", "true", "--use-cpu", "true", "--save-steps", "1"]
TABLE_AND_PICTURE = ("json", "md", "tex", "png", "svg")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A directory that holds all that commands read, write and cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    model = tiny_model(dtype=torch.float32, attention="sdpa", vocab_size=len(tokenizer))
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    toy_pairs(40, flip_every=3).to_json("train.jsonl")
    toy_pairs(16, seed=1).to_json("clean.jsonl")
    return tmp_path


def assert_left(home, *names):
    """These stand there, and whatever stands there is safe."""
    for name in names:
        assert (home / name).is_file(), name
    assert_safe_files(home)


def answers(path, response):
    rows = [{"prompt": f"Question {i}?", "response": response(i)} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def judged(home, command, judge, *more):
    answers(home / "ours.jsonl", lambda i: "good " * (i % 3))
    answers(home / "theirs.jsonl", lambda i: "good answer")
    main([command, "--responses", "ours.jsonl", "--baseline", "theirs.jsonl", "--output", "out",
          "--judge_model", "m", "--base_url", judge.url, *more])  # fmt: skip


def test_sft_and_train(home):
    main(["sft", "--model", "model", "--train", "train.jsonl", "--output", "sft", "--max-steps",
          "2", *SETTINGS])  # fmt: skip
    main(["train", "--method", "mspo", "--model", "sft", "--train", "train.jsonl", "--clean",
          "clean.jsonl", "--output", "run", "--max-steps", "2", "--meta-batch-size", "8",
          *SETTINGS])  # fmt: skip
    assert_left(home, "sft/sft_targets.json", "sft/checkpoint-1/optimizer.safetensors",
                "run/label_history.parquet", "run/checkpoint-1/rng.safetensors")  # fmt: skip


def test_audit(home):
    main(["audit", "--model", "model", "--data", "train.jsonl", "--clean", "clean.jsonl",
          "--output", "out"])  # fmt: skip
    assert_left(home, "out/labels.jsonl", "out/cleaned.jsonl", "out/summary.json",
                "out/report.html")  # fmt: skip
    assert list((home / "cache").rglob("*.safetensors"))  # the scores are looked at too


def test_generate(home):
    main(["generate", "--model", "model", "--prompts", "clean.jsonl", "--output", "out.jsonl",
          "--max_new_tokens", "3"])  # fmt: skip
    assert_left(home, "out.jsonl", "out.jsonl.record.json")


def test_judge(home):
    with serving(Script()) as judge:
        judged(home, "judge", judge)
    assert_left(home, "out/verdicts.jsonl", "out/outcomes.jsonl", "out/judge.json")


def test_compare(home):
    with serving(Script()) as judge:
        (home / "second.yaml").write_text(f"judge_model: other\nbase_url: {judge.url}\n")
        judged(home, "compare", judge, "--controls", "true", "--second_judge", "second.yaml")
    assert_left(home, "out/verdicts.jsonl", *(f"out/compare.{kind}" for kind in TABLE_AND_PICTURE))


def test_study(home):
    toy_pairs(6, seed=2).to_json("test.jsonl")
    main(["study", "fig3", "--preset", "tiny", "--model", "model", "--train", "train.jsonl",
          "--clean", "clean.jsonl", "--test", "test.jsonl", "--seeds", "1000", "--jobs", "1",
          "--output", "out"])  # fmt: skip
    assert_left(home, *(f"out/fig3.{kind}" for kind in TABLE_AND_PICTURE))
    assert list((home / "out" / "cells").rglob("run.json"))


STATE = {"weight": [1.0, 2.0], "step": 3}


@pytest.mark.parametrize("name", ["state.txt", "state.json", "state.safetensors", "state.png"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_found_by_its_content(tmp_path, name, protocol):
    (tmp_path / name).write_bytes(pickle.dumps(STATE, protocol))
    with pytest.raises(AssertionError, match="is a pickle"):
        assert_safe_files(tmp_path)


@pytest.mark.parametrize(
    ("save", "found"),
    [
        (lambda path: torch.save(STATE, path), "is a zip"),
        (lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False), "is a pickle"),
    ],
)
def test_what_torch_saves_is_found_whatever_it_is_called(tmp_path, save, found):
    save(tmp_path / "state.json")
    with pytest.raises(AssertionError, match=found):
        assert_safe_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.bin", b"{}"),
        ("weights", b"{}"),
        ("a.json", b"{"),
        ("a.json", b'{"loss": NaN}'),
        ("a.jsonl", b"{}\n{"),
        ("a.md", b"\xff\xfe"),
        ("a.safetensors", b"{}"),
        ("a.parquet", b"PAR1"),
        ("a.arrow", b"{}"),
        ("a.png", b"{}"),
    ],
)
def test_what_is_not_as_it_is_called_is_found(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception, match="."):
        assert_safe_files(tmp_path)
