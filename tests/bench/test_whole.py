"""Whole commands: each reads and does what it should, and their time is counted once."""

from __future__ import annotations

import json
import time
from functools import reduce
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from softpref.bench import benchmark, command, whole
from softpref.bench.benchmark import OLDEST_TRL, BenchOptions, run_bench
from softpref.bench.command import PHASES, Stopwatch
from softpref.bench.whole import (
    ENTRANTS,
    CommandCost,
    cost_record,
    cost_tables,
    given_inputs,
    random_inputs,
    request_of,
    run_command,
    time_commands,
)
from softpref.bench.workload import ModelSize, Shape, Workload
from softpref.errors import UsageError

pytestmark = pytest.mark.skipif(
    Version(version("trl")) < Version(OLDEST_TRL), reason=f"bench needs TRL {OLDEST_TRL}"
)
TINY = Workload(ModelSize(64, 16, 24, 2, 4, 2, tie_word_embeddings=False), Shape(8, 4), "cpu")


@pytest.fixture
def inputs(tmp_path):
    return random_inputs(TINY, tmp_path)


@pytest.fixture
def unwrapped(monkeypatch):
    """Undo the timing of calls, and arguments, after a command ran in this process."""
    for _, module, name in (*command._OURS, *command._THEIRS):
        *owners, attribute = name.split(".")
        owner = reduce(getattr, owners, import_module(module))
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))
    utils = import_module("trl.trainer.utils")
    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)
    monkeypatch.setattr("sys.argv", ["softpref"])


def phases_of(name, inputs, home):
    home.mkdir()
    request = request_of(name, inputs, home) | {"phases": str(home / "phases.json")}
    command._main(json.loads(json.dumps(request)))
    return json.loads((home / "phases.json").read_text())


def test_each_command_writes_a_model_and_is_timed_by_phase(tmp_path, unwrapped, monkeypatch):
    """In one process, so that imports, which take seconds, are done."""
    monkeypatch.setattr(whole, "TRAINING_PAIRS", 16)
    inputs, began = random_inputs(TINY, tmp_path), time.perf_counter()
    names = ("trl_best", "dpo", "mspo")
    found = {name: phases_of(name, inputs, tmp_path / name) for name in names}
    took = time.perf_counter() - began
    assert 0 < sum(wall for of in found.values() for wall, _ in of.values()) <= took
    for name, phases in found.items():
        run = tmp_path / name / "run"
        assert (run / "adapter_model.safetensors").is_file()
        assert set(phases) == set(PHASES)
        expected = {"loading", "reading", "reference", "steps", "saving"}
        expected |= {"layout and engine"} if name != "trl_best" else set()
        expected |= {"labelling"} if name == "mspo" else set()
        took_time = {phase for phase, (wall, _) in phases.items() if wall > 0}
        assert took_time - {"imports", "other"} == expected
        assert (run / "labels.jsonl").is_file() == (name != "trl_best")
        state = json.loads(next(run.rglob("trainer_state.json")).read_text())
        assert state["global_step"] == 2
    record = json.loads((tmp_path / "mspo/run/run.json").read_text())
    assert [record["data"][name]["pairs"] for name in ("train", "clean")] == [16, 16]
    taken = ("meta_batch_size", "meta_every", "tuning", "beta", "max_length", "label_pairs")
    assert [record["options"][name] for name in taken] == [1, 1, "lora", 0.1, 1024, None]


def test_labels_are_switched_off_for_one(inputs, tmp_path):
    with_labels, without = (
        request_of(name, inputs, tmp_path)["arguments"] for name in ("mspo", "mspo_unlabelled")
    )
    assert without == [*with_labels, "--label_pairs", "False"]


def test_trl_is_asked_for_its_defaults_and_its_best(inputs, tmp_path):
    default, best = (request_of(name, inputs, tmp_path) for name in ("trl_default", "trl_best"))
    assert not default["response_only_head"]
    assert best["response_only_head"]
    more = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    assert best["options"] == default["options"] | more
    assert default["lora"] == {
        "r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
    }  # fmt: skip


def test_a_stopwatch_counts_an_inner_phase_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(command.time, "process_time", lambda: 0.0)
    watch = Stopwatch()
    with watch.timing("saving"), watch.timing("labelling"):
        pass
    watch.mark()
    walls = {phase: wall for phase, (wall, _) in watch.seconds.items() if wall}
    assert walls == {"other": 6.0, "saving": 6.0, "labelling": 3.0}


def process(tmp_path, monkeypatch, *lines):
    """Put a script in the place of Python."""
    script = tmp_path / "python"
    script.write_text("\n".join(["#!/bin/sh", *lines]))
    script.chmod(0o755)
    monkeypatch.setattr(whole.sys, "executable", str(script))


def test_a_command_is_a_process_of_its_own(inputs, tmp_path, monkeypatch):
    phases = tmp_path / "phases.json"
    writes = f"""echo '{{"steps": [1, 2]}}' > {phases}"""
    is_called = 'test "$OMP_NUM_THREADS $1 $2" = "1 -m softpref.bench.command"'
    process(tmp_path, monkeypatch, writes, is_called)
    cost = run_command("dpo", inputs, tmp_path)
    assert cost.phases == {"steps": [1, 2]}
    assert 0 < cost.wall < 60
    assert cost.peak_mib > 0
    process(tmp_path, monkeypatch, "echo one; echo 'softpref train: no such file.'; exit 2")
    with pytest.raises(UsageError, match=r"^softpref train: no such file\.$"):
        run_command("dpo", inputs, tmp_path)
    process(tmp_path, monkeypatch, "echo Traceback; exit 1")
    with pytest.raises(RuntimeError, match="dpo failed:\nTraceback"):
        run_command("dpo", inputs, tmp_path)


SECONDS = {"trl_default": 10.0, "trl_best": 8.0, "dpo": 5.0, "mspo": 6.0, "mspo_unlabelled": 4.0}


def test_rounds_rotate_and_ratios_are_within_a_round(inputs, tmp_path, monkeypatch, caplog):
    order = []

    def run(name, read, home):
        slow = 1 + len(order) // len(ENTRANTS)  # the second round is twice as slow
        order.append(name)
        took = SECONDS[name] * slow
        return CommandCost(2 * took, took, 100.0, dict.fromkeys(PHASES, (0.0, took / 9)))

    monkeypatch.setattr(whole, "run_command", run)
    *_, costs = time_commands(inputs, 2, lambda: None)
    assert order == [*ENTRANTS, *ENTRANTS[1:], ENTRANTS[0]]
    record = cost_record(costs)
    assert record["ratios"]["mspo_vs_trl_default"] == {"wall": 0.6, "processor": 0.6}
    assert record["ratios"]["mspo_vs_dpo"]["processor"] == 1.2
    assert len(record["commands"]["mspo"]) == 2
    totals, phases = cost_tables(costs)
    assert totals[1][:4] == ("TRL DPO, its defaults", "30.0", "15.0", "100.0")
    assert totals[4][-3:] == ("0.60", "0.75", "1.20")
    assert phases[1][1:] == (f"{15 / 9:.1f}",) * len(PHASES)

    order.clear()
    monkeypatch.setitem(benchmark.PRESETS, "cpu", benchmark.BenchPreset((TINY,), 1, 1, {}))
    caplog.set_level("INFO")
    run_bench(BenchOptions(whole=True, rounds=1, json=str(tmp_path / "whole.json")))
    assert order == list(ENTRANTS)
    assert "softpref train --method mspo" in caplog.text
    written = json.loads((tmp_path / "whole.json").read_text())
    assert written["ratios"] == record["ratios"]
    assert written["model"] is None


def test_given_pairs_are_taken_in_their_order(tmp_path):
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(81)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    home = tmp_path / "home"
    home.mkdir()
    read = given_inputs(str(tmp_path), str(path), "cpu", home)
    train, clean = (
        [json.loads(line) for line in Path(file).read_text().splitlines()]
        for file in (read.train, read.clean)
    )
    assert (train, clean) == (rows[:64], rows[64:80])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ".", "pairs": "p"}, "--model: only --whole reads it; leave it out, or give --w"),
        ({"whole": True, "model": "."}, "--model and --pairs: give both, or neither"),
        ({"whole": True, "pairs": "p"}, "--model and --pairs: give both, or neither"),
        ({"whole": True, "plot": "x.png"}, "--plot: plots the times of steps; leave it out"),
        ({"whole": True, "model": "nowhere", "pairs": "p"}, "--model nowhere: no such directory"),
        ({"whole": True, "model": ".", "pairs": "few.jsonl"}, "few.jsonl: has 2 rows: give at le"),
        ({"whole": True, "model": ".", "pairs": "p.csv"}, "--pairs p.csv: give a .jsonl file"),
        ({"whole": True, "model": ".", "pairs": "bad.jsonl"}, "bad.jsonl, .* 2: .* Fix it"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    other = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    (tmp_path / "few.jsonl").write_text(f"{row}\n{other}\n")
    (tmp_path / "bad.jsonl").write_text(f"{row}\n{{}}\n")
    with pytest.raises(UsageError, match=message):
        run_bench(BenchOptions(**options))
