"""Peak memory of a few training steps, each contestant in its own process.

Run as a module, this is that process: it reads a JSON request from its first argument and prints
the peak in MiB.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from softpref.bench.contestants import Name, make_contestant
from softpref.bench.workload import ModelSize, Shape, Workload
from softpref.models.loading import Tuning

STEPS = 3
MIB = 2**20
# glibc keeps freed memory, and the amount depends on the order of allocations. With fixed
# thresholds it returns tensors of 64 KiB or more to the system at once.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": str(2**16),
}


def peak_in_new_process(name: Name, workload: Workload, tuning: Tuning) -> float:
    """Return the peak of `STEPS` steps above the memory in use before the first, MiB.

    On "cpu" this is the process' resident memory, on "cuda" the memory that torch has allocated.
    """
    request = json.dumps({"name": name, "workload": asdict(workload), "tuning": tuning})
    done = subprocess.run(
        [sys.executable, "-m", "softpref.bench.memory", request],
        env=os.environ | MALLOC,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def _main(request: str) -> None:
    """Measure the requested contestant and print its peak, MiB."""
    torch.set_num_threads(1)
    asked = json.loads(request)
    given = asked["workload"]
    workload = Workload(
        **given | {"size": ModelSize(**given["size"]), "shape": Shape(**given["shape"])}
    )
    with tempfile.TemporaryDirectory() as home:
        print(peak(asked["name"], workload, asked["tuning"], Path(home)))


def peak(name: Name, workload: Workload, tuning: Tuning, home: Path) -> float:
    """Return the peak of `STEPS` steps above the memory in use before the first, MiB."""
    contestant = make_contestant(name, workload, tuning, home)
    on_cuda = workload.device == "cuda"
    before = _start_on_cuda() if on_cuda else _start_on_cpu()
    for batch in range(STEPS):
        contestant.clear()
        contestant.step(batch)
    highest = torch.cuda.max_memory_allocated() if on_cuda else _highest_resident()
    return (highest - before) / MIB


def _start_on_cuda() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _start_on_cpu() -> int:
    """Reset the peak of resident memory if the system can, and return it, bytes."""
    # Outside Linux the peak before the first step is the baseline.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _highest_resident()


def _highest_resident() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _main(sys.argv[1])
