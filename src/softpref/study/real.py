"""Studies on real pairs: a user's own chat model and files of pairs with known right labels."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from pyarrow.parquet import read_table
from torch import Tensor

from softpref.algorithm.likelihood import Measured
from softpref.algorithm.methods import METHODS
from softpref.data.sources import load_pairs
from softpref.data.tokens import tokenize_pairs
from softpref.judging.options import JudgeOptions
from softpref.judging.rates import RESAMPLES, bootstrap_interval
from softpref.models.layout import choose_layout, longest_pairs
from softpref.models.loading import load_policy, load_tokenizer
from softpref.models.reference import fingerprint_weights
from softpref.models.scoring import Scorer
from softpref.study.grid import Cell, Target
from softpref.study.presets import drop_weights
from softpref.study.readings import flips_by_uid, noise_rate_estimate
from softpref.study.real_pairs import (
    Sizes,
    Split,
    characters,
    load_known_pairs,
    split,
    training_rows,
)
from softpref.study.real_tables import describe, draw_accuracy
from softpref.training.align import AlignFiles, align
from softpref.training.config import MSPOConfig, recipe
from softpref.training.finished import read_record
from softpref.training.metrics import auroc
from softpref.training.output import write_lines, write_text
from softpref.training.recipes import teaching_share

logger = logging.getLogger(__name__)

REAL = Target(
    "Methods on real pairs", "method", "labels",
    {
        "method": ("dpo", "perpcorrect", "gdpo", "rdpo", "mspo", "evidence", "oracle"),
        "pairs": (),
        "labels": ("flips:0", "flips:0.2", "flips:0.4"),
    },
    metrics=(), text=describe, picture=draw_accuracy,
)  # fmt: skip
START = "start.json"
BATCH = 8
TIMED_STEPS = 2
FORWARD = 1 / 2
"""Cost of a pass without gradients, relative to a LoRA step on the same number of pairs."""


@dataclass(frozen=True)
class RealPreset:
    """A chat model and files of pairs whose right labels are known.

    Attributes:
        model: directory or hub id.
        files: files of pairs by the name in `Cell.pairs`.
        sizes: sizes of a cell's parts.
        training: alignment options, the same for all methods.
        home: directory of the parts that cells share.
    """

    model: str
    files: Mapping[str, str]
    sizes: Sizes
    training: Mapping[str, Any]
    home: Path
    judge: JudgeOptions | None = None

    @property
    def version(self) -> dict[str, Any]:
        """The model's weights, sizes and training; names of files contain a hash."""
        policy = load_policy(self.model, trust_remote_code=False)
        return {
            "preset": "real",
            "model": fingerprint_weights(policy),
            "sizes": asdict(self.sizes),
            "training": dict(self.training),
        }

    def shared_key(self, cell: Cell) -> tuple[str, int]:
        """Return file and seed, which fix the test and trusted pairs."""
        assert cell.pairs
        return cell.pairs, cell.seed

    def prepare(self, *shared: Any) -> None:
        """Write test and trusted pairs, and the starting model's margins on the test pairs."""
        home = self._home(*shared)
        weights = fingerprint_weights(load_policy(self.model, trust_remote_code=False))
        if (home / START).is_file() and _record(home)["model"] == weights:
            return
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        parts = self._split(*shared)
        write_lines(home / "test.jsonl", parts.test)
        write_lines(home / "trusted.jsonl", parts.trusted)
        test = self._tokenized(home / "test.jsonl")
        start = self._measured(self.model, test)
        summed = start.chosen_logp - start.rejected_logp
        lengths = [[len(ids) for ids in test[name]] for name in ("chosen_ids", "rejected_ids")]
        chosen, rejected = map(torch.tensor, lengths)
        kept = set(test["uid"])  # others are too long for the model
        rows = [row for row in parts.test if row["uid"] in kept]
        longer = [characters(row["chosen"]) - characters(row["rejected"]) for row in rows]
        mean = start.chosen_logp / chosen - start.rejected_logp / rejected
        record = {
            "model": weights,
            "prompts": [json.dumps(row["prompt"]) for row in rows],
            "margin": summed.tolist(),
            "start_sum_accuracy": positive_share(summed),
            "start_mean_accuracy": positive_share(mean),
            "length_rule_accuracy": positive_share(torch.tensor(longer)),
        }
        write_text(home / START, json.dumps(record))

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Draw labels, align and measure on the test pairs."""
        began = time.monotonic(), time.process_time()
        files = self._files(cell, directory)
        align(files, self._config(cell))
        run = Path(files.output)
        home = self._home(*self.shared_key(cell))
        start = _record(home)
        after = self._measured(files.output, self._tokenized(home / "test.jsonl"))
        margin = after.chosen_logp - after.rejected_logp - torch.tensor(start["margin"])
        write_text(directory / "margins.json", json.dumps(margin.tolist()))
        low, high = interval(margin, start["prompts"])
        drop_weights(run)
        return {
            "preference_accuracy": positive_share(margin),
            "preference_accuracy_low": low,
            "preference_accuracy_high": high,
            **{name: start[name] for name in start if name.endswith("_accuracy")},
            "test_pairs": len(margin),
            "test_prompts": len(set(start["prompts"])),
            **label_numbers(cell.method, str(files.train), run),
            "wall_seconds": time.monotonic() - began[0],
            "cpu_seconds": time.process_time() - began[1],
        }

    def estimate(self, cells: Sequence[Cell], jobs: int) -> str:
        """Return the cost of the cells as a sentence, from timed steps on each file.

        A step with a meta-learner costs (1 + m) plain steps (`teaching_share`). A cell also has a
        pass over all pairs at the end, a reference pass over pairs that no earlier cell has
        measured, and its start.
        """
        timed = {
            pairs: self._time(next(cell for cell in cells if cell.pairs == pairs))
            for pairs in dict.fromkeys(cell.pairs for cell in cells)
        }
        filled = recipe("recommended")
        m = teaching_share(filled["meta_batch_size"], BATCH, filled["meta_every"])
        seconds, scored = [], set()
        for cell in cells:
            step, rest, train = timed[cell.pairs]
            steps = self.training["num_train_epochs"] * math.ceil(train / BATCH)
            forward = self.sizes.test + train
            forward += self.sizes.trusted * _reads_trusted_pairs(cell.method)
            if (split := self.shared_key(cell)) not in scored:
                forward += self.sizes.test + self.sizes.trusted
            if (labelled := (split, cell.labels)) not in scored:
                forward += train
            scored |= {split, labelled}
            factor = 1 + m * METHODS[cell.method].teaches
            seconds.append(rest + step * (steps * factor + forward / BATCH * FORWARD))
        hours = sum(seconds) / 3600
        measured = ", ".join(
            f"a step of {BATCH} pairs of {str(pairs).partition('@')[0]} takes {step:.1f} s"
            for pairs, (step, *_) in timed.items()
        )
        return (
            f"{len(cells)} runs of {min(seconds) / 60:.1f} to {max(seconds) / 60:.1f} minutes "
            f"each, in all {hours:.1f} hours on one thread, {hours / jobs:.1f} hours with "
            f"--jobs {jobs}, if the processors are idle: {measured}."
        )

    def _time(self, cell: Cell) -> tuple[float, float, int]:
        """Return the seconds per step and outside steps, and the number of training pairs."""
        began = time.monotonic()
        with TemporaryDirectory() as directory:
            files = self._files(replace(cell, method="dpo"), Path(directory) / "cell")
            rows = load_pairs(files.train).pairs
            train = len(rows)
            write_lines(
                Path(directory) / "few.jsonl", rows.select(range(min(TIMED_STEPS * BATCH, train)))
            )
            few = replace(files, train=str(Path(directory) / "few.jsonl"), clean=None)
            config = self._config(
                cell, method="dpo", max_steps=TIMED_STEPS, reference_cache=directory
            )
            align(few, config)
            lines = (Path(files.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            logged = {name: value for line in lines for name, value in json.loads(line).items()}
        training = float(logged["train_runtime"])
        step = training / TIMED_STEPS
        passes = step * TIMED_STEPS * FORWARD
        return step, max(0.0, time.monotonic() - began - training - passes), train

    def _files(self, cell: Cell, directory: Path) -> AlignFiles:
        assert cell.pairs
        assert cell.labels
        directory.mkdir(parents=True)
        pool = self._split(cell.pairs, cell.seed).pool
        path = self.files[cell.pairs]
        rows = training_rows(pool, cell.labels, self.sizes.train, cell.seed, path)
        write_lines(directory / "noisy.jsonl", rows)
        noisy, run = str(directory / "noisy.jsonl"), str(directory / "run")
        trusted = str(self._home(*self.shared_key(cell)) / "trusted.jsonl")
        clean = trusted if _reads_trusted_pairs(cell.method) else None
        return AlignFiles(self.model, noisy, clean, None, run)

    def _config(self, cell: Cell, **others: Any) -> MSPOConfig:
        own: dict[str, Any] = {
            "method": cell.method,
            "seed": cell.seed,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "reference_cache": str(self.home / "reference"),
            **dict.fromkeys(("logging_strategy", "save_strategy"), "no"),
        }
        return MSPOConfig(disable_tqdm=True, **own | {**self.training, **others})

    def _split(self, pairs: str, seed: int) -> Split:
        tokenizer = load_tokenizer(self.model, trust_remote_code=False)
        known = load_known_pairs(self.files[pairs], as_chat=tokenizer.chat_template is not None)
        return split(known, self.sizes, seed, self.files[pairs])

    def _home(self, pairs: str, seed: int) -> Path:
        return self.home / f"{pairs}-seed{seed}"

    def _tokenized(self, path: Path) -> Dataset:
        tokenizer = load_tokenizer(self.model, trust_remote_code=False)
        length = self._config(Cell("dpo", 0)).max_length
        return tokenize_pairs(load_pairs(str(path)).pairs, tokenizer, length, name=str(path)).pairs

    def _measured(self, model: str, pairs: Dataset) -> Measured:
        config = self._config(Cell("dpo", 0))
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        policy = load_policy(model, trust_remote_code=False, dtype=dtype).to(config.device)
        layout = choose_layout(config.resolved_layout(), policy, longest_pairs(pairs))
        scorer = Scorer(policy, layout.apply(policy), batch_size=BATCH, bf16=config.bf16)
        return scorer.measure(pairs, "test pairs")


def _record(home: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((home / START).read_text(encoding="utf-8"))
    return {"model": None} | record


def _reads_trusted_pairs(method: str) -> bool:
    """Return whether a method reads trusted pairs, if only for the noise rate."""
    return bool({"clean", "noise_rate"} & METHODS[method].needs)


def positive_share(margins: Tensor) -> float:
    """Return the share of positive margins (n,); zero counts half."""
    return float((margins > 0).double().mean() + (margins == 0).double().mean() / 2)


def interval(margins: Tensor, prompts: Sequence[str]) -> tuple[float, float]:
    """Return the 95% interval of the share of positive margins (n,) by resampling prompts."""
    right = (margins > 0).double() + (margins == 0).double() / 2

    def share(weights: Tensor) -> Tensor:
        return (weights * right).sum(-1) / weights.sum(-1)

    return bootstrap_interval(share, prompts, RESAMPLES, seed=0)


def label_numbers(method: str, noisy: str, run: Path) -> dict[str, float]:
    """Return the share of wrong labels, the run's estimate of it, and the AUROC of its labels.

    `label_auroc` is of the pairs' mean soft labels in training. It is omitted for the oracle and
    for methods that give all pairs the same label.
    """
    truth = flips_by_uid(noisy)
    numbers = {"train_pairs": len(truth), "noise_rate": sum(truth.values()) / len(truth)}
    numbers |= noise_rate_estimate(read_record(run))
    history = read_table(run / "label_history.parquet", columns=["uid", "soft_label"])
    by_pair = history.group_by("uid").aggregate([("soft_label", "mean")])
    labels = torch.tensor(by_pair["soft_label_mean"].to_pylist())
    is_right = torch.tensor([not truth[uid] for uid in by_pair["uid"].to_pylist()])
    found = auroc(labels, is_right)
    if method != "oracle" and labels.unique().numel() > 1 and not math.isnan(found):
        numbers["label_auroc"] = found
    return numbers
