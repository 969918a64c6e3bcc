"""Which labels of real pairs are wrong? Ways to find them on sets whose truth is known.

Every file is scored once, in its true order. Of every split some pairs are trusted; of the others a
share is flipped, or, where rows have `gold` and `judges` as LLMBar's, those that a judge got wrong.
Every way of finders.py sees the same splits. Results go to TABLE.json, tables to TABLE.md, and a
picture to TABLE.png and TABLE.svg.

    python -m benchmarks.evidence --model MODEL --pairs a.jsonl b.jsonl --output runs/evidence
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

import torch
from benchmarks.audit_table import draw, tables
from benchmarks.finders import WAYS, Split, measure, word_differences
from datasets import Dataset
from torch import Tensor

from softpref.auditing.scores import score_sets
from softpref.data.column_cache import ColumnCache
from softpref.data.sources import load_pairs, subset
from softpref.plots import save_figure
from softpref.statistics.pair_signals import PairSignals
from softpref.training.config import MSPOConfig
from softpref.training.evidence import SIGNAL_NAMES, signals_of
from softpref.training.output import write_lines, write_text

LEAST_AUDITED = 80
SETTINGS = ("first", "splits", "trusted", "trusted_errors", "rate", "longest", "max_length", "bf16")


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
        on_bad_row="skip", use_cpu=args.use_cpu, per_device_eval_batch_size=4,
    )  # fmt: skip
    return score_sets(model, rest, trusted, config, ColumnCache(str(home / "cache"))).pairs


def splits(
    pairs: PairSignals, words: Tensor, wrong: Tensor | None, args: argparse.Namespace
) -> Iterator[tuple[Split, Tensor]]:
    """Yield splits, and which of their noisy labels are wrong, (n,)."""
    for seed in range(args.first, args.first + args.splits):
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pairs), generator=draw)
        count = min(args.trusted, len(pairs) - LEAST_AUDITED)
        trusted, noisy = order[:count], order[count:]
        if wrong is None:
            flips = torch.zeros(len(noisy), dtype=torch.bool)
            flips[torch.randperm(len(noisy), generator=draw)[: round(args.rate * len(noisy))]] = 1
        else:
            flips = wrong[noisy]
        errors = torch.zeros(count, dtype=torch.bool)
        errors[: round(args.trusted_errors * count)] = True
        split = Split(
            swapped(of(pairs, noisy), flips),
            swapped(of(pairs, trusted), errors),
            words[noisy] * (1 - 2 * flips.double())[:, None],
            words[trusted] * (1 - 2 * errors.double())[:, None],
            seed,
        )
        yield split, flips


def sets_of(
    path: Path, label: str, args: argparse.Namespace
) -> Iterator[tuple[str, PairSignals, Tensor, Tensor | None]]:
    """Yield sets of a file: name, signals, words, and which labels are wrong if that is given."""
    rows, verdicts = truly_ordered(path, args.longest)
    pairs = scored(args.model, rows, Path(args.output) / label.replace("/", "-"), args)
    signals = signals_of(pairs, SIGNAL_NAMES)
    kept = [int(uid) for uid in pairs["uid"]]
    texts = [tuple(rows[i][part][0]["content"] for part in ("chosen", "rejected")) for i in kept]
    words = word_differences(texts)
    yield f"{label}, {args.rate:.0%} flips", signals, words, None
    for judge in dict.fromkeys(name for one in verdicts for name in one):
        judged = [at for at, i in enumerate(kept) if verdicts[i].get(judge) is not None]
        if len(judged) >= 2 * LEAST_AUDITED:
            these = torch.tensor(judged)
            wrong = torch.tensor([bool(verdicts[kept[at]][judge]) for at in judged])
            yield f"{label}, {judge}", of(signals, these), words[these], wrong


def measured(splits: Iterator[tuple[Split, Tensor]]) -> dict:
    """Return a set's size, true rates and numbers of every way, lists over splits."""
    ways: dict[str, dict[str, list]] = {way: {} for way in WAYS}
    true_rate, pairs = [], 0
    for split, flips in splits:
        pairs = len(flips)
        true_rate.append(100 * float(flips.double().mean()))
        for way, lists in ways.items():
            for name, value in measure(way, split, flips).items():
                lists.setdefault(name, []).append(value)
    return {"noisy_pairs": pairs, "true_rate": true_rate, "ways": ways}


def write(results: Mapping[str, dict], settings: Mapping[str, object], table: Path) -> None:
    """Write results, tables and pictures under one name."""
    table.parent.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "sets": results}
    write_text(table.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_text(table.with_suffix(".md"), tables(results, settings))
    for ending in (".png", ".svg"):
        save_figure(draw(results), table.with_suffix(ending))


def main() -> None:
    """Score, split, measure and write, printing a line for each set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", nargs="+", required=True)
    parser.add_argument("--output", required=True, help="where scores are kept")
    parser.add_argument("--table", help="name of the results, no ending; OUTPUT/real-audit")
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
    results: dict[str, dict] = {}
    for name in args.pairs:
        path = Path(name)
        for what, signals, words, wrong in sets_of(path, f"{path.parent.name}/{path.stem}", args):
            results[what] = measured(splits(signals, words, wrong, args))
            ways = results[what]["ways"].items()
            means = (f"{way} {fmean(numbers['auroc']):.1f}" for way, numbers in ways)
            print(f"{what} ({len(signals)} pairs): {', '.join(means)}", flush=True)
    settings = {"model": Path(args.model).name} | {name: getattr(args, name) for name in SETTINGS}
    write(results, settings, Path(args.table or Path(args.output) / "real-audit"))


if __name__ == "__main__":
    main()
