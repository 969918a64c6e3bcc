"""Which labels of a judge are wrong? Ways to tell them, on pairs whose right answer is known.

The file's rows have `prompt`, `response_1`, `response_2`, `gold` (1 or 2: the better one) and
`judges` (by name, the verdicts in both orders, 1 or 2), as LLMBar's. Of every seed 80 pairs are
trusted; the others carry the judge's first verdict, whose mistakes depend on the pair, unlike flips
that are drawn. AUROC of telling right labels from wrong, mean ± deviation over seeds.

    python benchmarks/judge_labels.py --pairs llmbar/pairs.jsonl --model sft --output runs/judges
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm

from softpref.data.messages import CONTEXT, as_text
from softpref.study.scorers import SCORERS, NoisySet, measure_scorer
from softpref.training.align import AlignFiles
from softpref.training.config import MSPOConfig
from softpref.training.output import write_lines, write_text

CLEAN_PAIRS = 80
LONGEST = 900  # characters of prompt and longer response: what a context of 512 tokens can hold
LEARNING_RATE = 1e-4


def pair(row: dict, chosen: int) -> dict:
    """Return the row as a pair whose chosen response is number `chosen`."""
    texts = {"chosen": row[f"response_{chosen}"], "rejected": row[f"response_{3 - chosen}"]}
    context = {name: row[name] for name in CONTEXT if name in row}
    return {"prompt": row["prompt"], **context, **texts, "is_flipped": chosen != row["gold"]}


def make_case(rows: list[dict], name: str, seed: int, model: str, home: Path) -> NoisySet:
    """Write the trusted pairs and those that the judge has labelled."""
    home.mkdir(parents=True)
    shuffled = random.Random(seed).sample(rows, len(rows))
    clean, judged = shuffled[:CLEAN_PAIRS], shuffled[CLEAN_PAIRS:]
    files = {part: home / f"{part}.jsonl" for part in ("clean", "noisy")}
    write_lines(files["clean"], (pair(row, row["gold"]) for row in clean))
    write_lines(files["noisy"], (pair(row, row["judges"][name][0]) for row in judged))

    def config(method: str) -> MSPOConfig:
        special = {"perpcorrect_mode": "official"} if method == "perpcorrect" else {}
        return MSPOConfig(
            method=method, tuning="full", learning_rate=LEARNING_RATE, max_length=512, seed=seed,
            logging_strategy="no", save_strategy="no", disable_tqdm=True, **special,
        )  # fmt: skip

    return NoisySet(
        AlignFiles(model, str(files["noisy"]), str(files["clean"]), None, str(home / "run")), config
    )


def main() -> None:
    """Judge every judge's labels by every way and print the table."""
    parser = argparse.ArgumentParser(description="Ways to tell a judge's wrong labels.")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scorers", nargs="+", default=list(SCORERS), choices=SCORERS)
    parser.add_argument("--output", type=Path, required=True, help="new directory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = options.pairs.read_text(encoding="utf-8").splitlines()
    rows = [
        row for row in map(json.loads, lines)
        if len(as_text(row["prompt"]))
        + max(len(as_text(row[f"response_{number}"])) for number in (1, 2)) < LONGEST
    ]  # fmt: skip
    found: dict[str, dict[str, list[float]]] = {}
    cells = [(name, seed) for name in rows[0]["judges"] for seed in range(options.seeds)]
    for name, seed in tqdm(cells, unit="set"):
        for scorer in options.scorers:
            home = options.output / f"{name}-{seed}-{scorer}"
            case = make_case(rows, name, seed, options.model, home)
            aurocs = found.setdefault(name, {}).setdefault(scorer, [])
            aurocs.append(measure_scorer(scorer, case)["label_auroc"])
            write_text(options.output / "auroc.json", json.dumps(found, indent=1) + "\n")
    print(f"{len(rows)} pairs, {CLEAN_PAIRS} of them trusted, {options.seeds} seeds\n")
    print(
        "| judge | wrong | "
        + " | ".join(options.scorers)
        + " |\n"
        + "|---" * (len(options.scorers) + 2)
        + "|"
    )
    for name, by_scorer in found.items():
        wrong = fmean(row["judges"][name][0] != row["gold"] for row in rows)
        numbers = (
            f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"
            for values in by_scorer.values()
        )
        print(f"| {name} | {wrong:.1%} | " + " | ".join(numbers) + " |")


if __name__ == "__main__":
    main()
