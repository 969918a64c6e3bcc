"""`train` under torchrun as a user starts it: one output, one voice, an end whatever happens."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softpref.cli import main
from softpref.models.sharding import can_shard
from softpref.training.checkpoints import LOSS, newest_complete
from softpref.training.output import one_writer
from softpref.world.language import make_tokenizer
from tests.distributed.launch import together, torchrun
from tests.progress import finished, wait_for
from tests.tiny import tiny_model
from tests.toy import toy_pairs

GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pairs and a model."""
    home = tmp_path_factory.mktemp("jobs")
    tokenizer = make_tokenizer()
    model = tiny_model(dtype=torch.float32, attention="sdpa", vocab_size=len(tokenizer))
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    toy_pairs(83, flip_every=3).to_json(home / "train.jsonl")
    toy_pairs(20, seed=1).to_json(home / "clean.jsonl")
    return home


def arguments(processes: int, output: str, *more: str) -> list[str]:
    return [
        "train", "--method", "mspo", "--model", "model",
        "--train", "train.jsonl", "--clean", "clean.jsonl", "--output", output,
        "--per-device-train-batch-size", str(GLOBAL_BATCH // processes),
        "--gradient-accumulation-steps", "1", "--meta-batch-size", "8", "--learning-rate", "1e-2",
        "--reference-cache", f"cache-{output}", "--use-cpu", "true", "--disable-tqdm", "true",
        *more,
    ]  # fmt: skip


def train(home: Path, processes: int, output: str, *more: str) -> subprocess.Popen:
    """Start it as a user does."""
    return torchrun(processes, "softpref.cli", *arguments(processes, output, *more), cwd=home)


def trained(home: Path, processes: int, output: str, *more: str) -> tuple[int, str]:
    """Run it to its end."""
    return together(processes, "softpref.cli", *arguments(processes, output, *more), cwd=home)


def weights(directory: Path) -> torch.Tensor:
    saved = directory / "adapter_model.safetensors"
    tensors = load_file(saved if saved.exists() else directory / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def alone(home):
    """The same run by one process."""
    code, output = trained(home, 1, "alone", "--num-train-epochs", "2")
    assert code == 0, output
    return home / "alone"


def near(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return float((a - b).norm() / b.norm()) < 1e-4


@pytest.fixture(scope="module")
def two(home):
    """What two processes say; they leave a checkpoint of step 8 too."""
    code, output = finished(train(home, 2, "two", "--num-train-epochs", "2", "--save-steps", "8"))
    assert code == 0, output
    return output


def as_if_it_had_died(home: Path, run: str) -> None:
    """Begin a run with the checkpoint that two processes left at step 8."""
    shutil.copytree(home / "two" / "checkpoint-8", home / run / "checkpoint-8")


def test_two_processes_leave_what_one_leaves(home, alone, two):
    output = two
    assert "processes: 2" in output
    for said in ("train: 83 pairs", "noise rate:", "steps: 22 of 8 pairs", "written: two"):
        assert output.count(said) == 1, said
    names = [sorted(path.name for path in run.iterdir() if not path.name.startswith("checkpoint"))
             for run in (home / "two", alone)]  # fmt: skip
    assert names[0] == names[1]
    assert near(home / "two", alone)
    ours, theirs = (
        [json.loads(line) for line in (run / "labels.jsonl").read_text().splitlines()]
        for run in (home / "two", alone)
    )
    assert [row["uid"] for row in ours] == [row["uid"] for row in theirs]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row["p_correct"] for row in ours] == pytest.approx(
        [row["p_correct"] for row in theirs], abs=1e-4
    )


@pytest.mark.skipif(not can_shard(), reason="needs transformers 5.19 and torch 2.13")
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_sharded_base_leaves_what_a_whole_one_leaves(home, alone, two, goes_on):
    run = f"shards-{goes_on}"
    if goes_on:
        as_if_it_had_died(home, run)
    code, output = trained(
        home, 2, run, "--num-train-epochs", "2", "--save-steps", "8", "--shard", "true"
    )
    assert code == 0, output
    assert output.count("base: in shards, one on each of 2 processes") == 1
    assert (f"resuming from {run}/checkpoint-8" in output) == goes_on
    assert newest_complete(home / run)[0] == home / run / "checkpoint-22"
    assert near(home / run, alone)


FULL = ("--tuning", "full", "--max-steps", "8", "--learning-rate", "1e-3", "--save-steps", "4")
IN_SHARDS = ("--shard", "true")


@pytest.fixture(scope="module")
def full(home):
    """Runs of all weights, by one process and in shards on two; both leave checkpoints."""
    for processes, run, shards in ((1, "full-alone", ()), (2, "full-two", IN_SHARDS)):
        code, output = trained(home, processes, run, *FULL, *shards)
        assert code == 0, output
    assert output.count("all weights: in shards, one on each of 2 processes") == 1


@pytest.mark.skipif(not can_shard(), reason="needs transformers 5.19 and torch 2.13")
def test_all_weights_in_shards_leave_what_one_process_leaves(home, full):
    one, two = home / "full-alone", home / "full-two"
    assert near(two, one)
    assert not near(two, home / "model")
    files = [sorted(path.name for path in run.iterdir()) for run in (one, two)]
    assert files[0] == files[1]
    config = (one / "config.json").read_text()
    assert (two / "config.json").read_text() == config  # nothing of shards
    saved = [path.name for path in (two / "checkpoint-4" / "shards").iterdir()]
    assert len(saved) == 2
    assert all(name.endswith(".safetensors") for name in saved)


@pytest.mark.skipif(not can_shard(), reason="needs transformers 5.19 and torch 2.13")
@pytest.mark.parametrize(
    ("start", "processes", "options"),
    [("full-two", 4, IN_SHARDS), ("full-two", 1, ()), ("full-alone", 2, IN_SHARDS)],
)
def test_a_run_in_shards_resumes_in_another_number_of_processes(
    home, full, start, processes, options
):
    run = f"{start}-in-{processes}"
    shutil.copytree(home / start / "checkpoint-4", home / run / "checkpoint-4")
    code, output = trained(home, processes, run, *FULL, *options)
    assert code == 0, output
    assert f"resuming from {run}/checkpoint-4" in output
    assert near(home / run, home / "full-alone")


def fine_tuned(home: Path, processes: int, output: str, *more: str) -> tuple[int, str]:
    return together(
        processes, "softpref.cli", "sft", "--model", "model", "--train", "train.jsonl",
        "--output", output, "--per-device-train-batch-size", str(GLOBAL_BATCH // processes),
        "--learning-rate", "1e-3", "--use-cpu", "true", "--disable-tqdm", "true",
        "--max-steps", "10", *more, cwd=home,
    )  # fmt: skip


def test_fine_tuning_by_two_processes_is_that_of_one(home):
    starts = [(1, "sft-alone", ()), (2, "sft-two", ())]
    if can_shard():
        starts.append((2, "sft-shards", IN_SHARDS))
    for processes, run, shards in starts:
        code, output = fine_tuned(home, processes, run, "--save-steps", "3", *shards)
        assert code == 0, output
        assert output.count(f"written: {run}") == 1
        assert newest_complete(home / run)[0] == home / run / "checkpoint-10"
    assert float((weights(home / "sft-alone") - weights(home / "model")).norm()) > 0.1
    for _, run, _ in starts:
        assert near(home / run, home / "sft-alone")
    sums = [
        json.loads((home / run / "checkpoint-3" / "extra.json").read_text())[LOSS]
        for _, run, _ in starts
    ]
    assert all(each == pytest.approx(sums[0], rel=1e-4) for each in sums)  # a resumed run logs it


EXPERTS = {
    "num_key_value_heads": 2, "intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
}  # fmt: skip


@pytest.mark.skipif(not can_shard(), reason="needs transformers 5.19 and torch 2.13")
def test_fine_tuned_experts_go_into_shards_and_out_of_them(home):
    """A whole checkpoint has them one by one, by other names; shards have them as they train."""
    tokenizer = make_tokenizer()
    model = tiny_model("qwen2_moe", torch.float32, "sdpa", vocab_size=len(tokenizer), **EXPERTS)
    model.save_pretrained(home / "experts")
    tokenizer.save_pretrained(home / "experts")
    options = ("--model", "experts", "--save-steps", "2", "--max-steps", "6")
    runs = [
        (1, "experts-one", (), None),
        (2, "experts-in", IN_SHARDS, home / "experts-one" / "checkpoint-2"),
        (1, "experts-out", (), home / "experts-in" / "checkpoint-4"),
    ]
    for processes, run, shards, start in runs:
        if start:
            shutil.copytree(start, home / run / start.name)
        code, output = fine_tuned(home, processes, run, *options, *shards)
        assert code == 0, output
        assert (start is None) or f"resuming from {run}/{start.name}" in output
        assert near(home / run, home / "experts-one")
    assert not near(home / "experts-one", home / "experts")


def workers(job: subprocess.Popen) -> list[int]:
    """Return the processes that torchrun has started, rank by rank."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True, check=False
    )
    return sorted(map(int, found.stdout.split()))


LONG = ("--num-train-epochs", "2000", "--save-steps", "5", "--save-total-limit", "2")


def test_sigterm_ends_all_after_the_same_step_and_one_process_goes_on(home):
    job = train(home, 2, "resumed", *LONG)
    wait_for(lambda: newest_complete(home / "resumed")[0] is not None, job)
    os.kill(workers(job)[1], signal.SIGTERM)  # it reaches one of them alone, then once more all
    os.kill(job.pid, signal.SIGTERM)
    _, output = finished(job)
    assert re.search(r"ended by SIGTERM after step \d+", output), output[-3000:]
    assert output.count("ended by SIGTERM") == 1
    checkpoint, skipped = newest_complete(home / "resumed")
    assert checkpoint is not None
    assert not skipped
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    step = state["global_step"]
    shorter = ("--max-steps", str(step + 3), "--force", "true")
    code, output = trained(home, 1, "resumed", *LONG, *shorter)
    assert code == 0, output
    assert f"resuming from resumed/checkpoint-{step}" in output


def test_a_run_of_two_processes_goes_on_in_four_and_ends_where_one_ends(home, alone, two):
    as_if_it_had_died(home, "moved")
    same = ("--num-train-epochs", "2", "--save-steps", "8")
    code, output = trained(home, 4, "moved", *same)
    assert code == 0, output
    assert "resuming from moved/checkpoint-8" in output
    assert near(home / "moved", alone)


def test_a_process_that_dies_ends_the_job(home):
    job = train(home, 2, "dies", *LONG)
    wait_for(lambda: newest_complete(home / "dies")[0] is not None, job)
    os.kill(workers(job)[1], signal.SIGKILL)
    code, output = finished(job)
    assert code != 0
    assert "SIGKILL" in output or "Signal 9" in output, output[-3000:]


def test_other_commands_are_refused_in_several_processes(home):
    code, output = finished(torchrun(2, "softpref", "inject", "--model", "model", cwd=home))
    assert code != 0
    assert output.count("softpref inject: runs in one process, and 2 were started") == 1, output
    assert "only sft, train, audit, generate, judge, compare share their work" in output


def test_what_the_first_process_refuses_is_said_once_and_ends_all(home):
    """The other one waits for it, and must not report that it has gone."""
    with one_writer(home / "drawn.jsonl"):
        code, output = together(
            2, "softpref.cli", "generate", "--model", "model", "--prompts", "clean.jsonl",
            "--max-new-tokens", "2", "--output", "drawn.jsonl", cwd=home,
        )  # fmt: skip
    assert code != 0
    assert output.count("softpref generate: drawn.jsonl: another process is writing it") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP is not supported: train runs"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported: train runs"),
    ],
)
def test_engines_that_shard_are_refused_in_words(home, variables, words, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--method", "dpo", "--model", str(home / "model"),
              "--train", str(home / "train.jsonl"), "--output", str(home / "sharded"),
              "--use-cpu", "true"])  # fmt: skip
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
