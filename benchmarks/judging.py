"""Throughput of judging and of generation by a server, against what server and concurrency permit.

A scripted server in a process of its own takes a fixed time to answer; with c calls in flight it
permits c / latency answers a second. From the repository's root:

    python benchmarks/judging.py
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from softpref.judging.ask import ask_judge, make_judge
from softpref.judging.generate_options import GenerateOptions
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Comparison
from softpref.judging.responses import Prompt
from softpref.judging.served import Writer, orders_of, served_responses

ROUNDS = 3


def answers_a_second(url: str, concurrency: int, calls: int) -> float:
    """Judge half as many pairs in both orders, log included."""
    options = JudgeOptions(judge_model="m", base_url=url, concurrency=concurrency)
    comparisons = [
        Comparison(str(i), f"Question {i}?", "good", f"reply {i}") for i in range(calls // 2)
    ]
    judge = make_judge(options)
    with tempfile.TemporaryDirectory() as home, VerdictLog(Path(home) / "verdicts.jsonl") as log:
        start = time.perf_counter()
        judged = ask_judge(comparisons, judge, options, log)
        took = time.perf_counter() - start
    assert not judged.failures
    return judged.calls / took


def responses_a_second(url: str, concurrency: int, calls: int) -> float:
    """Write so many responses, log included."""
    options = GenerateOptions("m", base_url=url, concurrency=concurrency, max_new_tokens=64)
    orders = orders_of([Prompt(f"Question {i}?") for i in range(calls)], options)
    writer = Writer(options)
    with tempfile.TemporaryDirectory() as home:
        start = time.perf_counter()
        found = served_responses(orders, writer, options, {}, Path(home) / "out.jsonl.progress")
        took = time.perf_counter() - start
    assert all(found[0])
    return calls / took


WORK = {"judging": answers_a_second, "generation": responses_a_second}


def main() -> None:
    """Measure every setting and print the table."""
    parser = argparse.ArgumentParser(description="Throughput of judging, of what is permitted.")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.2, 0.5], help="seconds")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seconds", type=float, default=10.0, help="least time a measurement")
    parser.add_argument("--work", choices=WORK, nargs="+", default=[*WORK])
    options = parser.parse_args()
    print("| work | latency, s | calls in flight | permitted, calls/s | reached (range) | share | "
          "processor, ms/call |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for latency in options.latency:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.judging.server", "--latency", str(latency)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert server.stdout
            url = server.stdout.readline().strip()
            for name, concurrency in itertools.product(options.work, options.concurrency):
                permitted = concurrency / latency
                calls = 2 * int(permitted * options.seconds / 2)
                before = time.process_time()
                reached = [WORK[name](url, concurrency, calls) for _ in range(ROUNDS)]
                own = 1000 * (time.process_time() - before) / (ROUNDS * calls)
                middle = statistics.median(reached)
                print(f"| {name} | {latency} | {concurrency} | {permitted:.0f} | {middle:.1f} "
                      f"({min(reached):.1f} to {max(reached):.1f}) | {middle / permitted:.1%} | "
                      f"{own:.1f} |",
                      flush=True)  # fmt: skip
        finally:
            server.kill()


if __name__ == "__main__":
    main()
