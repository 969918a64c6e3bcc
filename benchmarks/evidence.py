"""Which labels of real pairs are wrong? The audit's evidence on sets whose truth is known.

Every file is scored once, in its true order. Of every split some pairs are trusted; of the others a
share is flipped, or, where rows have `gold` and `judges` as LLMBar's, those that a judge got wrong.
AUROC of telling right labels from wrong, x 100, mean and 95% interval over splits, of PPLDiff, of
the token-length difference with the sign that fits the trusted pairs, and of evidence; beside it
the noise rate, estimated and true, and the calibration error of `p_correct`.

    python benchmarks/evidence.py --model MODEL --pairs a.jsonl b.jsonl --output runs/evidence
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev

import torch
from datasets import Dataset
from torch import Tensor

from softpref.algorithm.calibration import expected_calibration_error
from softpref.algorithm.evidence import fit_evidence
from softpref.algorithm.pair_signals import PairSignals
from softpref.auditing.scores import score
from softpref.data.sources import load_pairs, subset
from softpref.training.config import MSPOConfig
from softpref.training.evidence import SIGNAL_NAMES, signals_of
from softpref.training.metrics import auroc
from softpref.training.output import write_lines, write_text

JUDGES = ("GPT-4", "PaLM2")
LEAST_AUDITED = 80


def swapped(pairs: PairSignals, these: Tensor) -> PairSignals:
    """Return the pairs with the responses of `these` (N,) exchanged."""
    sign = 1 - 2 * these.double()
    odd = {
        name: values * (sign if values.ndim == 1 else sign[:, None])
        for name, values in pairs.odd.items()
    }
    return PairSignals(pairs.fluency * sign, odd, pairs.even)


def of(pairs: PairSignals, which: Tensor) -> PairSignals:
    """Return the pairs at `which` alone."""
    return PairSignals(
        pairs.fluency[which],
        {name: values[which] for name, values in pairs.odd.items()},
        {name: values[which] for name, values in pairs.even.items()},
    )


def truly_ordered(path: Path, longest: int) -> tuple[list[dict], list[dict]]:
    """Return rows as pairs, the better response chosen, and what judges say of each."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs, verdicts = [], []
    for row in rows:
        if "gold" in row:
            texts = row[f"response_{row['gold']}"], row[f"response_{3 - row['gold']}"]
        else:
            texts = row["chosen"], row["rejected"]
        if sum(map(len, (row["prompt"], *texts))) > longest:
            continue
        user = [{"role": "user", "content": row["prompt"]}]
        answers = [[{"role": "assistant", "content": text}] for text in texts]
        pairs.append({"prompt": user, "chosen": answers[0], "rejected": answers[1]})
        first = {name: said[0] for name, said in row.get("judges", {}).items()}
        verdicts.append({name: said and said != row["gold"] for name, said in first.items()})
    return pairs, verdicts


def scored(model: str, rows: list[dict], home: Path, args: argparse.Namespace) -> Dataset:
    """Return the pairs with reference log-probabilities and signals."""
    path = home / "pairs.jsonl"
    home.mkdir(parents=True, exist_ok=True)
    write_lines(path, ({"uid": str(i)} | row for i, row in enumerate(rows)))
    loaded = load_pairs(str(path), on_bad_row="skip")
    trusted = subset(loaded, loaded.pairs.select(range(10)), "trusted")
    rest = subset(loaded, loaded.pairs.select(range(10, len(loaded.pairs))), str(path))
    config = MSPOConfig(
        output_dir=str(home), method="dpo", max_length=args.max_length, bf16=args.bf16,
        on_bad_row="skip", reference_cache=str(home / "cache"), use_cpu=args.use_cpu,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    both = score(model, rest, trusted, config)
    return both.pairs


def splits(pairs: PairSignals, wrong: Tensor | None, args: argparse.Namespace) -> Iterator[dict]:
    """Yield what each split comes to."""
    for split in range(args.first, args.first + args.splits):
        draw = torch.Generator().manual_seed(split)
        order = torch.randperm(len(pairs), generator=draw)
        count = min(args.trusted, len(pairs) - LEAST_AUDITED)
        trusted, noisy = order[:count], order[count:]
        flips = torch.zeros(len(noisy), dtype=torch.bool)
        if wrong is None:
            flips[torch.randperm(len(noisy), generator=draw)[: round(args.rate * len(noisy))]] = 1
        else:
            flips = wrong[noisy]
        errors = torch.zeros(count, dtype=torch.bool)
        errors[: round(args.trusted_errors * count)] = True
        given = swapped(of(pairs, noisy), flips)
        clean = swapped(of(pairs, trusted), errors)
        evidence = fit_evidence(given, clean, split)
        p_correct = evidence.probability_correct(evidence.noisy, evidence.rates(given))
        sign = 1 if clean.odd["length"].sign().sum() >= 0 else -1
        yield {
            "ppl_diff": 100 * auroc(given.fluency, ~flips),
            "length": 100 * auroc(sign * given.odd["length"], ~flips),
            "evidence": 100 * auroc(evidence.noisy, ~flips),
            "ece": 100 * expected_calibration_error(p_correct, ~flips),
            "rate": 100 * evidence.noise.rate,
            "covered": float(evidence.noise.low <= flips.double().mean() <= evidence.noise.high),
            "true_rate": 100 * float(flips.double().mean()),
            "speaks": float(evidence.speaks),
        }


def main() -> None:
    """Score, split, and write `evidence.json`, printing a line for each set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", nargs="+", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first split")
    parser.add_argument("--trusted", type=int, default=140)
    parser.add_argument("--trusted_errors", type=float, default=0.0, help="share, at random")
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--longest", type=int, default=1200, help="characters of a pair")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--use_cpu", action="store_true")
    args = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    for name in args.pairs:
        path = Path(name)
        rows, verdicts = truly_ordered(path, args.longest)
        label = f"{path.parent.name}/{path.stem}"
        pairs = scored(args.model, rows, Path(args.output) / label.replace("/", "-"), args)
        signals = signals_of(pairs, SIGNAL_NAMES)
        said = [verdicts[int(uid)] for uid in pairs["uid"]]
        sets: dict[str, tuple[PairSignals, Tensor | None]] = {
            f"{label}, {args.rate:.0%} flips": (signals, None)
        }
        for judge in JUDGES:
            judged = [i for i, one in enumerate(said) if one.get(judge) is not None]
            if judged:
                wrong = torch.tensor([bool(said[i][judge]) for i in judged])
                sets[f"{label}, {judge}"] = (of(signals, torch.tensor(judged)), wrong)
        for what, (some, wrong) in sets.items():
            runs = list(splits(some, wrong, args))
            results[what] = {key: [run[key] for run in runs] for key in runs[0]}
            print(f"{what} ({len(some)} pairs): " + ", ".join(
                f"{key} {fmean(values):.1f} ± {2.26 * stdev(values) / len(values) ** 0.5:.1f}"
                for key, values in results[what].items()), flush=True)  # fmt: skip
    for key in ("ppl_diff", "length", "evidence"):
        means = [fmean(of_set[key]) for of_set in results.values()]
        print(f"{key}: mean of sets {fmean(means):.1f}, worst {min(means):.1f}")
    write_text(Path(args.output) / "evidence.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
