"""Runs that are killed at random moments end as if nothing had happened, to the last bit.

Three kills here, and as many as SOFTPREF_KILLS says in `make test-faults`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from tests.forked import Forked
from tests.progress import finished, wait_for

KILLS = int(os.environ.get("SOFTPREF_KILLS", "3"))
STEPS = max(40, 12 * KILLS)
COMPARED = ("model.safetensors", "meta_learner.safetensors", "labels.jsonl",
            "label_history.parquet", "metrics.jsonl")  # fmt: skip
SHAPES = {
    "accumulating, taught at every second step": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "meta_every": 2,
        "save_steps": 1,
    },
    "taught at every step, saved in the middle of epochs": {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "meta_every": 1,
        "save_steps": 3, "save_total_limit": 2, "zscore": "running",
    },
}  # fmt: skip


def command(files, output, shape):
    options = {
        "model": files / "model", "train": files / "train.jsonl", "clean": files / "clean.jsonl",
        "output": files / output, "tuning": "full", "learning_rate": 1e-3, "meta_batch_size": 8,
        "max_steps": STEPS, "logging_steps": 5, "use_cpu": "true", "disable_tqdm": "true",
    } | shape  # fmt: skip
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return ["train", *flags]


def start(arguments):
    return Forked("softpref.cli", *arguments)


def without_times(name, content):
    """Of the log, all but how long things took, which a process knows of itself alone."""
    if name != "metrics.jsonl":
        return content
    times = ("_runtime", "_per_second", "total_flos")
    lines = map(json.loads, content.splitlines())
    return [{k: v for k, v in line.items() if not k.endswith(times)} for line in lines]


def kill_after_the_last_step(files, shape):
    """Kill while labels are made, when the last checkpoint stands and nothing after it."""
    if (files / "killed" / "run.json").exists():
        return
    process = start(command(files, "killed", shape))
    last = files / "killed" / f"checkpoint-{STEPS}"
    wait_for(lambda: last.exists() or process.poll() is not None, process, every=0.001)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("shape", SHAPES.values() if KILLS > 3 else [*SHAPES.values()][:1])
def test_killed_runs_end_alike(files, shape):
    draw = random.Random(KILLS)
    undisturbed = start(command(files, "whole", shape))
    code, said = finished(undisturbed)
    assert code == 0, said
    kills = 0
    while kills < KILLS and not (files / "killed" / "run.json").exists():
        process = start(command(files, "killed", shape))
        if draw.random() < 0.9:  # else at any moment, before the first step as well
            wait_for(lambda process=process: "\nsteps:" in process.said, process, every=0.01)
        time.sleep(draw.uniform(0, 0.8))
        if process.poll() is not None:
            assert process.returncode == 0, process.said
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills >= max(3, KILLS // 2), "the run was over too soon to be killed"
    kill_after_the_last_step(files, shape)
    if not (files / "killed" / "run.json").exists():
        last = start(command(files, "killed", shape))
        code, said = finished(last)
        assert code == 0, said
    for name in COMPARED:
        whole, killed = (
            without_times(name, (files / output / name).read_bytes())
            for output in ("whole", "killed")
        )
        assert whole == killed, f"{name} differs after {kills} kills"
