"""Do the win rate's intervals cover? By simulation, with prompts answered once and several times.

A prompt's chance to be won is drawn from a Beta distribution around the true rate (of strength 2:
prompts differ a lot), then each of its answers is won by that chance, and 20% are ties. In how many
of the sets Wilson's interval and the bootstrap over prompts hold the true rate, and how wide they
are. Tables in Markdown.

    python benchmarks/judge_intervals.py --sets 1000
"""

from __future__ import annotations

import argparse
from random import Random
from statistics import median

import torch
from tqdm import tqdm

from softpref.judging.outcomes import Outcome
from softpref.judging.rates import Interval, judged_rate

RATES = (0.5, 0.7, 0.9)
SIZES = ((50, 1), (200, 1), (1000, 1), (50, 8), (200, 8))
STRENGTH = 2.0
TIES = 0.2
RESAMPLES = 500


def draw(rate: float, prompts: int, answers: int, random: Random) -> list[Outcome]:
    """Return one set of outcomes."""
    found = []
    for prompt in range(prompts):
        chance = random.betavariate(STRENGTH * rate, STRENGTH * (1 - rate))
        for answer in range(answers):
            result = "win" if random.random() < chance else "loss"
            result = "tie" if random.random() < TIES else result
            length = random.randint(-100, 100)
            found.append(Outcome(f"{prompt}-{answer}", str(prompt), result, False, None, length))
    return found


def holds(interval: Interval, rate: float) -> bool:
    """Return whether the rate lies within."""
    return interval[0] <= rate <= interval[1]


def main() -> None:
    """Simulate every setting and print the table."""
    parser = argparse.ArgumentParser(description="Coverage of a win rate's 95%% intervals.")
    parser.add_argument("--sets", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| true rate, % | prompts × answers | Wilson covers, % | width | by prompts covers, % | "
          "width |\n|---|---|---|---|---|---|")  # fmt: skip
    settings = [(rate, size) for rate in RATES for size in SIZES]
    with tqdm(total=len(settings) * options.sets, unit="set", disable=None) as bar:
        for rate, (prompts, answers) in settings:
            random = Random(f"{rate}/{prompts}/{answers}")
            intervals: dict[str, list[Interval]] = {"wilson": [], "prompts": []}
            for seed in range(options.sets):
                outcomes = draw(rate, prompts, answers, random)
                found = judged_rate(outcomes, resamples=RESAMPLES, seed=seed)
                intervals["wilson"].append(found.interval)
                intervals["prompts"].append(found.clustered_interval)
                bar.update()
            cells = []
            for ends in intervals.values():
                covered = sum(holds(interval, rate) for interval in ends) / options.sets
                width = median(high - low for low, high in ends)
                cells += [f"{100 * covered:.1f}", f"{100 * width:.1f}"]
            print(f"| {100 * rate:.0f} | {prompts} × {answers} | " + " | ".join(cells) + " |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
