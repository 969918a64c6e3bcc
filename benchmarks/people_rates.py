"""Which interval for people's win rate covers, and is shortest? By simulation.

Each of 1,000 comparisons (1,000 prompts answered once, or 125 answered eight times) is won with its
prompt's chance, drawn from a Beta distribution around the true rate (strength 2); people call 20%
ties. The judge is right in a given share of the others. A judge with `system` bias prefers the
response in 25% of the comparisons, whatever it is; one with `position` bias goes by the place in
30%, which both orders turn into ties. People judge some comparisons, drawn at random.

Rogan–Gladen takes, from the pairs that both decided, the judge's sensitivity and specificity, and
corrects its rate by them, with the delta method's interval. Tables in Markdown.

    python benchmarks/people_rates.py --sets 1000
"""

from __future__ import annotations

import argparse
import math
from random import Random
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from softpref.statistics.people_rate import PeopleRate, people_rate
from softpref.statistics.win_rate import student_97_5

RATES = (0.5, 0.7, 0.9)
SIZES = ((1000, 1), (125, 8))
ACCURACIES = (0.55, 0.65, 0.75, 0.85, 0.95)
BIASES = ("none", "system", "position")
STRENGTH = 2.0
PEOPLE_TIES = 0.2
JUDGE_TIES = {True: 0.3, False: 0.1}  # where people call a tie, and elsewhere
SYSTEM_BIAS, POSITION_BIAS = 0.25, 0.3
Interval = tuple[float, float]


def draw(
    rate: float, size: tuple[int, int], accuracy: float, bias: str, labels: int, random: Random
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Return the arguments of `people_rate` for one set."""
    people, judged, prompts = [], [], []
    for prompt in range(size[0]):
        chance = random.betavariate(STRENGTH * rate, STRENGTH * (1 - rate))
        for _ in range(size[1]):
            is_win, is_tie = random.random() < chance, random.random() < PEOPLE_TIES
            says_win = is_win == (random.random() < accuracy)
            says_tie = random.random() < JUDGE_TIES[is_tie]
            if bias == "system":
                says_win |= random.random() < SYSTEM_BIAS
            if bias == "position":
                says_tie |= random.random() < POSITION_BIAS
            people.append([is_win and not is_tie, not is_win and not is_tie])
            judged.append([says_win and not says_tie, not says_win and not says_tie])
            prompts.append(str(prompt))
    labelled = random.sample(range(len(people)), labels)
    verdicts = torch.tensor([people[place] for place in labelled], dtype=torch.float64)
    return verdicts, torch.tensor(labelled), torch.tensor(judged, dtype=torch.float64), prompts


def rogan_gladen(people: Tensor, labelled: Tensor, judged: Tensor) -> Interval:
    """Return Rogan–Gladen's interval, (0, 1) where the judge is no better than chance."""
    theirs = judged[labelled]
    both = (people.sum(-1) > 0) & (theirs.sum(-1) > 0)
    won, says = people[both, 0] > 0, theirs[both, 0]
    wins, losses = float(won.sum()), float((~won).sum())
    if not wins or not losses:
        return 0.0, 1.0
    sensitivity, specificity = float(says[won].mean()), 1 - float(says[~won].mean())
    youden = sensitivity + specificity - 1
    if youden <= 0:
        return 0.0, 1.0
    decided = float(judged.sum())
    apparent = float(judged[:, 0].sum()) / decided
    rate = (apparent + specificity - 1) / youden
    variance = (
        apparent * (1 - apparent) / decided
        + rate**2 * sensitivity * (1 - sensitivity) / wins
        + (1 - rate) ** 2 * specificity * (1 - specificity) / losses
    ) / youden**2
    half = student_97_5(int(wins + losses) - 2) * math.sqrt(variance)
    return max(rate - half, 0.0), min(rate + half, 1.0)


def row(
    settings: tuple[float, tuple[int, int], float, str], labels: int, sets: int, bar: tqdm[None]
) -> list[str]:
    """Return coverage and width of each interval, in percent, and the judge's median worth."""
    rate, size, accuracy, bias = settings
    random = Random(f"{settings}")
    intervals: dict[str, list[Interval]] = {"people": [], "rogan": [], "ppi": []}
    found: list[PeopleRate] = []
    for _ in range(sets):
        people, labelled, judged, prompts = draw(rate, size, accuracy, bias, labels, random)
        found.append(people_rate(people, labelled, judged, prompts))
        intervals["people"].append(found[-1].alone_interval)
        intervals["rogan"].append(rogan_gladen(people, labelled, judged))
        intervals["ppi"].append(found[-1].interval)
        bar.update()
    cells = []
    for ends in intervals.values():
        covered = sum(low <= rate <= high for low, high in ends) / sets
        width = median(high - low for low, high in ends)
        cells.append(f"{100 * covered:.1f} ({100 * width:.1f})")
    nothing = sum(each.judge_weight == 0 for each in found) / sets
    return [*cells, f"{median(each.worth for each in found):.0f}", f"{100 * nothing:.0f}"]


def main() -> None:
    """Simulate every setting and print the table."""
    parser = argparse.ArgumentParser(description="Coverage of intervals for people's win rate.")
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--labels", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["true rate, %", "prompts × answers", "judge right, %", "bias", "people alone"]
    columns += ["Rogan–Gladen", "PPI++", "worth", "worth nothing, %"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    settings = [
        (rate, size, accuracy, bias)
        for size in SIZES
        for rate in RATES
        for accuracy in ACCURACIES
        for bias in BIASES
    ]
    with tqdm(total=len(settings) * options.sets, unit="set", disable=None) as bar:
        for each in settings:
            rate, (prompts, answers), accuracy, bias = each
            about = [f"{100 * rate:.0f}", f"{prompts} × {answers}", f"{100 * accuracy:.0f}", bias]
            print(f"| {' | '.join([*about, *row(each, options.labels, options.sets, bar)])} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
