"""`softpref bench --whole`: a whole command, from its start to the written model, against TRL's.

Each command is a process of its own, as users start it. In every round each runs once, in an order
that rotates by one from round to round; ratios are formed within a round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from softpref.bench.command import PHASES
from softpref.bench.memory import MIB
from softpref.bench.workload import Workload
from softpref.data.bad_rows import place
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.models.loading import lora_config

Entrant = Literal["trl_default", "trl_best", "dpo", "mspo", "mspo_unlabelled"]
ENTRANTS: tuple[Entrant, ...] = get_args(Entrant)
BASELINES: tuple[Entrant, ...] = ("trl_default", "trl_best", "dpo")
TRAINING_PAIRS, TRUSTED_PAIRS, PAIRS_PER_STEP = 64, 16, 8
_OF_OURS: dict[Entrant, tuple[str, ...]] = {
    "dpo": ("--method", "dpo"),
    # m = 1/8, at every step.
    "mspo": ("--method", "mspo", "--meta_batch_size", "1", "--meta_every", "1"),
}
_BEST = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
_LABELS: dict[Entrant, str] = {
    "trl_default": "TRL DPO, its defaults",
    "trl_best": "TRL DPO at its best",
    "dpo": "softpref train --method dpo",
    "mspo": "softpref train --method mspo",
    "mspo_unlabelled": "the same, --label_pairs false",
}

_SHORT: dict[Entrant, str] = {
    "trl_default": "TRL's default",
    "trl_best": "TRL at its best",
    "dpo": "our DPO",
}
_TIMES = ("wall", "processor")


@dataclass(frozen=True)
class CommandInputs:
    """What all commands read.

    Attributes:
        model: directory of the model.
        train: JSONL of `TRAINING_PAIRS` pairs.
        clean: JSONL of `TRUSTED_PAIRS` pairs.
        device: "cpu" (float32, one thread) or "cuda" (bfloat16).
    """

    model: str
    train: str
    clean: str
    device: str


@dataclass(frozen=True)
class CommandCost:
    """What one command took.

    Attributes:
        wall: seconds from its start to its end.
        processor: seconds of processor time, all threads.
        peak_mib: peak of resident memory, MiB.
        phases: seconds of each phase, wall and processor.
    """

    wall: float
    processor: float
    peak_mib: float
    phases: dict[str, tuple[float, float]]


Costs = dict[Entrant, list[CommandCost]]


def random_inputs(workload: Workload, home: Path) -> CommandInputs:
    """Write a benchmark's random model and pairs to `home`."""
    batches = TRAINING_PAIRS // workload.pairs
    workload = replace(workload, batches=batches)
    workload.model("lora").save_pretrained(home / "model")
    workload.tokenizer().save_pretrained(home / "model")
    rows = [*workload.train_pairs().to_list(), *workload.clean_pairs().to_list()]
    lines = [json.dumps(row) for row in rows]
    return _inputs(str(home / "model"), lines, workload.device, home)


def given_inputs(model: str, pairs: str, device: str, home: Path) -> CommandInputs:
    """Take the first pairs of a JSONL file.

    Raises:
        UsageError: it cannot be read, or has a bad row or too few; or there is no such model.
    """
    if not Path(model).is_dir():
        raise UsageError(f"--model {model}: no such directory.")
    if not pairs.endswith(".jsonl"):
        raise UsageError(f"--pairs {pairs}: give a .jsonl file, a pair a line.")
    for bad in load_pairs(pairs, on_bad_row="skip").bad_rows:
        raise UsageError(f"--pairs {place(pairs, bad.row)}: {bad.reason}. Fix it, or remove it.")
    text = Path(pairs).read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < TRAINING_PAIRS + TRUSTED_PAIRS:
        raise UsageError(
            f"--pairs {pairs}: has {len(lines)} rows: give at least "
            f"{TRAINING_PAIRS + TRUSTED_PAIRS}, {TRAINING_PAIRS} to train on and {TRUSTED_PAIRS} "
            "trusted ones."
        )
    return _inputs(model, lines, device, home)


def _inputs(model: str, lines: Sequence[str], device: str, home: Path) -> CommandInputs:
    parts = {
        "train": lines[:TRAINING_PAIRS],
        "clean": lines[TRAINING_PAIRS : TRAINING_PAIRS + TRUSTED_PAIRS],
    }
    for name, part in parts.items():
        text = "".join(f"{line}\n" for line in part)
        (home / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return CommandInputs(model, str(home / "train.jsonl"), str(home / "clean.jsonl"), device)


def time_commands(
    inputs: CommandInputs, rounds: int, after_command: Callable[[], object]
) -> Iterator[Costs]:
    """Run every command once a round; yield the costs so far after each round."""
    costs: Costs = {name: [] for name in ENTRANTS}
    for i in range(rounds):
        first = i % len(ENTRANTS)
        for name in ENTRANTS[first:] + ENTRANTS[:first]:
            with tempfile.TemporaryDirectory() as home:
                costs[name].append(run_command(name, inputs, Path(home)))
            after_command()
        yield costs


def run_command(name: Entrant, inputs: CommandInputs, home: Path) -> CommandCost:
    """Run one command in a new process, which writes only to `home`."""
    phases, log = home / "phases.json", home / "log.txt"
    request = request_of(name, inputs, home) | {"phases": str(phases)}
    call = [sys.executable, "-m", "softpref.bench.command", json.dumps(request)]
    # A fresh cache for each run.
    environment = os.environ | {"HF_DATASETS_CACHE": str(home / "datasets")}
    if inputs.device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        start = time.perf_counter()
        process = subprocess.Popen(call, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        told = log.read_text(encoding="utf-8", errors="replace")
        if process.returncode == 2 and told.strip():  # a mistake in the model or the pairs
            raise UsageError(told.strip().splitlines()[-1])
        raise RuntimeError(f"{name} failed:\n{told}")
    unit = 1 if sys.platform == "darwin" else 1024
    return CommandCost(
        wall=wall,
        processor=usage.ru_utime + usage.ru_stime,
        peak_mib=usage.ru_maxrss * unit / MIB,
        phases=json.loads(phases.read_text(encoding="utf-8")),
    )


def request_of(name: Entrant, inputs: CommandInputs, home: Path) -> dict[str, Any]:
    """Return what `softpref.bench.command` is asked for."""
    on_cpu = inputs.device == "cpu"
    common = {
        "per_device_train_batch_size": PAIRS_PER_STEP,
        "num_train_epochs": 1,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "disable_tqdm": True,
        "report_to": "none",
    }
    if name in ("trl_default", "trl_best"):
        best = name == "trl_best"
        lora, output = lora_config(), {"output_dir": str(home / "run")}
        taken = ("r", "lora_alpha", "target_modules", "task_type")
        return {
            "model": inputs.model,
            "train": inputs.train,
            "lora": {key: getattr(lora, key) for key in taken},
            "options": common | output | (_BEST if best else {}),
            "response_only_head": best,
        }
    own = {
        "model": inputs.model,
        "train": inputs.train,
        "output": str(home / "run"),
        "reference_cache": str(home / "reference"),
        "gradient_accumulation_steps": 1,
    }
    if name != "dpo":
        own["clean"] = inputs.clean
    if name == "mspo_unlabelled":
        own["label_pairs"] = False
    flags = [text for key, value in (common | own).items() for text in (f"--{key}", str(value))]
    return {"arguments": ["train", *_OF_OURS["dpo" if name == "dpo" else "mspo"], *flags]}


def cost_tables(costs: Costs) -> list[list[tuple[str, ...]]]:
    """Return two tables, header first: what commands cost, and processor seconds by phase."""
    ratios = [f"{kind} x {_SHORT[base]}" for kind in _TIMES for base in BASELINES]
    totals: list[tuple[str, ...]] = [
        ("command", "wall, s", "processor, s", "host peak, MiB", *ratios)
    ]
    phases: list[tuple[str, ...]] = [("processor, s", *PHASES)]
    for name, of in costs.items():
        numbers = (median([getattr(cost, key) for cost in of]) for key in (*_TIMES, "peak_mib"))
        compared = (_ratio(costs, name, base, kind) for kind in _TIMES for base in BASELINES)
        cells = (*(f"{number:.1f}" for number in numbers), *(f"{ratio:.2f}" for ratio in compared))
        totals.append((_LABELS[name], *cells))
        spent = (median([cost.phases[phase][1] for cost in of]) for phase in PHASES)
        phases.append((_LABELS[name], *(f"{seconds:.1f}" for seconds in spent)))
    return [totals, phases]


def cost_record(costs: Costs) -> dict[str, Any]:
    """Return the JSON of a whole benchmark: every command's costs, and ratios' medians."""
    ratios = {
        f"{name}_vs_{base}": {kind: _ratio(costs, name, base, kind) for kind in _TIMES}
        for name in ENTRANTS
        for base in BASELINES
        if name != base
    }
    commands = {name: [asdict(cost) for cost in of] for name, of in costs.items()}
    counts = {"pairs": TRAINING_PAIRS, "clean_pairs": TRUSTED_PAIRS}
    return counts | {"commands": commands, "ratios": ratios}


def _ratio(costs: Costs, name: Entrant, base: Entrant, kind: str) -> float:
    ours, theirs = ([getattr(cost, kind) for cost in costs[of]] for of in (name, base))
    return median([a / b for a, b in zip(ours, theirs, strict=True)])
