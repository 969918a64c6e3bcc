"""Throughput of judging against what the server and the allowed concurrency permit.

A scripted server in a process of its own takes a fixed time to answer; with c calls in flight it
permits c / latency answers a second. From the repository's root:

    python benchmarks/judging.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from softpref.judging.ask import ask_judge, make_judge
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Comparison

ROUNDS = 3


def answers_a_second(url: str, concurrency: int, pairs: int) -> float:
    """Judge so many pairs in both orders, log included."""
    options = JudgeOptions(judge_model="m", base_url=url, concurrency=concurrency)
    comparisons = [Comparison(str(i), f"Question {i}?", "good", f"reply {i}") for i in range(pairs)]
    judge = make_judge(options)
    with tempfile.TemporaryDirectory() as home, VerdictLog(Path(home) / "verdicts.jsonl") as log:
        start = time.perf_counter()
        judged = ask_judge(comparisons, judge, options, log)
        took = time.perf_counter() - start
    assert not judged.failures
    return judged.calls / took


def main() -> None:
    """Measure every setting and print the table."""
    parser = argparse.ArgumentParser(description="Throughput of judging, of what is permitted.")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.2, 0.5], help="seconds")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seconds", type=float, default=10.0, help="least time a measurement")
    options = parser.parse_args()
    print("| latency, s | calls in flight | permitted, calls/s | reached (range) | share |")
    print("|---|---|---|---|---|")
    for latency in options.latency:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.judging.server", "--latency", str(latency)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert server.stdout
            url = server.stdout.readline().strip()
            for concurrency in options.concurrency:
                permitted = concurrency / latency
                pairs = int(permitted * options.seconds / 2)
                reached = [answers_a_second(url, concurrency, pairs) for _ in range(ROUNDS)]
                middle = statistics.median(reached)
                print(f"| {latency} | {concurrency} | {permitted:.0f} | {middle:.1f} "
                      f"({min(reached):.1f} to {max(reached):.1f}) | {middle / permitted:.1%} |",
                      flush=True)  # fmt: skip
        finally:
            server.kill()


if __name__ == "__main__":
    main()
