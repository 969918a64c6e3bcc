"""Does the 95% interval of `estimate_noise_rate` cover? By simulation, over shapes of PPLDiff.

For every shape of right labels' density f, noise rate and number of clean pairs: sets of 2,000
noisy pairs, in how many of them the interval holds the true rate (with Wilson's interval of that
share), its median width, and the bias of `rate` and `expected`; then the same where flips depend on
difficulty, which the estimator assumes they do not. Tables in Markdown.

    python benchmarks/noise_rate.py --sets 400 --json runs/noise_rate.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from softpref.statistics.noise_rate import NoiseRate, estimate_noise_rate

NOISY_PAIRS = 2000
CLEAN_SIZES = (50, 100, 150, 200)
RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
HARD_RATE, EASY_RATE = 0.4, 0.1
BY_DIFFICULTY = "by difficulty"
WILSON_95 = 1.96
NEGATIVE_88 = -1.175  # a standard Gaussian moved here is negative with probability 88%

Draw = Callable[[int, Generator], Tensor]


def gaussian(count: int, generator: Generator) -> Tensor:
    """Right for 88%, the surer the larger."""
    return torch.randn(count, generator=generator, dtype=torch.float64) + NEGATIVE_88


def heavy_tailed(count: int, generator: Generator) -> Tensor:
    """Student's t of 3 degrees of freedom, moved: right for 86%, less sure far out."""
    normal = torch.randn(4, count, generator=generator, dtype=torch.float64)
    return normal[0] / (normal[1:].square().sum(0) / 3).sqrt() - 1.3


def skewed(count: int, generator: Generator) -> Tensor:
    """0.57 minus a Gamma of shape 2: right for 89%, and always beyond 0.57, where f jumps to 0."""
    uniform = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return 0.57 + (1 - uniform).log().sum(0)


def saturating(count: int, generator: Generator) -> Tensor:
    """Right for 88% whatever its size; f jumps at 0."""
    size = gaussian(count, generator).abs()
    wrong = torch.rand(count, generator=generator, dtype=torch.float64) < 0.12
    return torch.where(wrong, size, -size)


def weak(count: int, generator: Generator) -> Tensor:
    """Draw from a Gaussian that is right for 60% only."""
    return torch.randn(count, generator=generator, dtype=torch.float64) - 0.253


SHAPES: dict[str, Draw] = {
    "Gaussian": gaussian,
    "heavy tails": heavy_tailed,
    "skewed": skewed,
    "saturating": saturating,
    "weak": weak,
}


@dataclass(frozen=True)
class Cell:
    """One setting; `rate` is a noise rate, or None where hard pairs are flipped at 40%, easy 10%.

    A pair is hard where its |PPLDiff| is below the median of the set.
    """

    shape: str
    rate: float | None
    clean: int

    @property
    def true_rate(self) -> float:
        """The probability that a pair of the set is flipped."""
        return (HARD_RATE + EASY_RATE) / 2 if self.rate is None else self.rate


@dataclass(frozen=True)
class Outcome:
    """What came out over the sets of one cell; rates and widths are shares of pairs, in [0, 1].

    Attributes:
        sets: how many sets were drawn.
        covered: how many intervals hold the true rate.
        median_width: of the interval.
        bias: mean of `rate` minus the true rate.
        bias_expected: mean of `expected` minus the true rate.
        standard_error: of `bias`.
    """

    sets: int
    covered: int
    median_width: float
    bias: float
    bias_expected: float
    standard_error: float


def flip(ppl_diff: Tensor, rate: float | None, generator: Generator) -> Tensor:
    """Turn the sign of each pair with its probability."""
    size = ppl_diff.abs()
    if rate is None:
        probability = torch.where(size < size.quantile(0.5), HARD_RATE, EASY_RATE)
    else:
        probability = torch.full_like(size, rate)
    drawn = torch.rand(len(size), generator=generator, dtype=torch.float64)
    return torch.where(drawn < probability, -ppl_diff, ppl_diff)


def estimate_once(cell: Cell, seed: int) -> NoiseRate:
    """Draw one set and estimate its rate."""
    generator, draw = Generator().manual_seed(seed), SHAPES[cell.shape]
    noisy = flip(draw(NOISY_PAIRS, generator), cell.rate, generator)
    return estimate_noise_rate(noisy, draw(cell.clean, generator))


def simulate(cell: Cell, seeds: Iterable[int]) -> Outcome:
    """Estimate the rate of one set a seed."""
    found = [estimate_once(cell, seed) for seed in seeds]
    true_rate = cell.true_rate
    rate, low, high, expected = torch.tensor(
        [(each.rate, each.low, each.high, each.expected) for each in found], dtype=torch.float64
    ).T
    # Grid points carry rounding: an end of 0.1 may read 0.1 + 1e-17.
    covered = (low <= true_rate + 1e-9) & (true_rate - 1e-9 <= high)
    return Outcome(
        sets=len(found),
        covered=int(covered.sum()),
        median_width=float((high - low).quantile(0.5)),
        bias=float(rate.mean()) - true_rate,
        bias_expected=float(expected.mean()) - true_rate,
        standard_error=float(rate.std()) / math.sqrt(len(found)),
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95% interval of a share, by E. B. Wilson (1927).

    With p = successes / trials and z = 1.96: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).
    """
    share, z2 = successes / trials, WILSON_95**2 / trials
    centre = (share + z2 / 2) / (1 + z2)
    reach = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return centre - reach, centre + reach


def coverage_text(outcome: Outcome) -> str:
    """Return "95.0 (92.4–96.7)", per cent; bold where even Wilson's upper end is below 95%."""
    low, high = (100 * end for end in wilson(outcome.covered, outcome.sets))
    text = f"{100 * outcome.covered / outcome.sets:.1f} ({low:.1f}–{high:.1f})"
    return f"**{text}**" if high < 95 else text


def accuracy_text(outcome: Outcome) -> str:
    """Return median width, bias of `rate` and bias of `expected`, in percentage points."""
    biases = (f"{100 * bias:+.1f}" for bias in (outcome.bias, outcome.bias_expected))
    return " / ".join([f"{100 * outcome.median_width:.0f}", *biases])


def table(results: dict[Cell, Outcome], text: Callable[[Outcome], str], *, dependent: bool) -> str:
    """Return rows of shape and rate against clean sizes, of dependent or of uniform flips."""
    rows = dict.fromkeys(
        (cell.shape, cell.rate) for cell in results if (cell.rate is None) == dependent
    )
    lines = ["| PPLDiff | flips | " + " | ".join(f"{n} clean" for n in CLEAN_SIZES) + " |"]
    lines.append("|---|---|" + "---|" * len(CLEAN_SIZES))
    for shape, rate in rows:
        of_sizes = [text(results[Cell(shape, rate, clean)]) for clean in CLEAN_SIZES]
        flips = BY_DIFFICULTY if rate is None else f"{rate:.0%}"
        lines.append(" | ".join([f"| {shape}", flips, *of_sizes]) + " |")
    return "\n".join(lines)


def write(results: dict[Cell, Outcome], path: Path) -> None:
    """Write one object a cell: the setting and what came out."""
    rows = [asdict(cell) | asdict(outcome) for cell, outcome in results.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def read(path: Path | None, sets: int) -> dict[Cell, Outcome]:
    """Return what an interrupted run of as many sets has written, if anything."""
    if path is None or not path.exists():
        return {}
    rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["sets"] == sets]
    return {
        Cell(**{field.name: row[field.name] for field in fields(Cell)}): Outcome(
            **{field.name: row[field.name] for field in fields(Outcome)}
        )
        for row in rows
    }


def main() -> None:
    """Simulate every cell that is not in the file yet and print the tables."""
    parser = argparse.ArgumentParser(description="Coverage of the noise rate's 95%% interval.")
    parser.add_argument("--sets", type=int, default=400, help="sets a setting, at least 2")
    parser.add_argument(
        "--json",
        type=Path,
        help="file for the numbers, written as they come; a run goes on from it",
    )
    options = parser.parse_args()
    if options.sets < 2:
        parser.error("--sets: give at least 2")
    torch.set_num_threads(1)
    cells = [
        Cell(shape, rate, clean)
        for shape in SHAPES
        for rate in (*RATES, None)
        for clean in CLEAN_SIZES
    ]
    results = read(options.json, options.sets)
    missing = [(place, cell) for place, cell in enumerate(cells) if cell not in results]
    with tqdm(total=len(missing) * options.sets, unit="set") as bar:
        for place, cell in missing:
            seeds = range(place * options.sets, (place + 1) * options.sets)
            results[cell] = simulate(cell, _counted(seeds, bar))
            if options.json:
                write(results, options.json)
    print("Coverage, %\n\n" + table(results, coverage_text, dependent=False))
    print("\nMedian width / bias of rate / bias of expected, percentage points\n")
    print(table(results, accuracy_text, dependent=False))
    print("\n" + table(results, coverage_text, dependent=True))
    print("\n" + table(results, accuracy_text, dependent=True))
    largest = max(outcome.standard_error for outcome in results.values())
    print(f"\nLargest standard error of a bias: {100 * largest:.1f} points")


def _counted(seeds: range, bar: tqdm) -> Iterable[int]:
    for seed in seeds:
        yield seed
        bar.update()


if __name__ == "__main__":
    main()
