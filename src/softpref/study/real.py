"""Studies on real pairs: a chat model and files of pairs of the user's own, of known truth."""

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
from softpref.training.align import RUN_RECORD, AlignFiles, align
from softpref.training.config import MSPOConfig, recipe
from softpref.training.metrics import auroc
from softpref.training.output import write_lines, write_text

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
"""Cost of a pass without gradients beside a step of as many pairs, with an adapter."""


@dataclass(frozen=True)
class RealPreset:
    """A chat model and files of pairs whose right labels are known.

    Attributes:
        model: directory or hub id.
        files: the files of pairs by the names that cells have for them.
        sizes: of a cell's parts.
        training: alignment options, the same for all methods.
        home: where parts that cells share lie.
    """

    model: str
    files: Mapping[str, str]
    sizes: Sizes
    training: Mapping[str, Any]
    home: Path
    judge: JudgeOptions | None = None

    @property
    def version(self) -> dict[str, Any]:
        """The model's weights, sizes and training; files are named by what they hold."""
        policy = load_policy(self.model, trust_remote_code=False)
        return {
            "preset": "real",
            "model": fingerprint_weights(policy),
            "sizes": asdict(self.sizes),
            "training": dict(self.training),
        }

    def shared_key(self, cell: Cell) -> tuple[str, int]:
        """The test and trusted pairs of a file and seed."""
        assert cell.pairs
        return cell.pairs, cell.seed

    def prepare(self, *shared: Any) -> None:
        """Write test and trusted pairs, and what the model says of the test pairs as it is."""
        home = self._home(*shared)
        if (home / START).is_file():
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
        longer = [characters(row["chosen"]) - characters(row["rejected"]) for row in parts.test]
        write_text(home / START, json.dumps({
            "prompts": [json.dumps(row["prompt"]) for row in parts.test],
            "margin": summed.tolist(),
            "start_sum_accuracy": positive_share(summed),
            "start_mean_accuracy": positive_share(
                start.chosen_logp / chosen - start.rejected_logp / rejected
            ),
            "length_rule_accuracy": positive_share(torch.tensor(longer)),
        }))  # fmt: skip

    def run(self, cell: Cell, directory: Path) -> dict[str, float]:
        """Draw labels, align, measure on the test pairs."""
        began = time.monotonic(), time.process_time()
        files = self._files(cell, directory)
        align(files, self._config(cell))
        run = Path(files.output)
        home = self._home(*self.shared_key(cell))
        start = json.loads((home / START).read_text(encoding="utf-8"))
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
        """Return what the cells would take, in words, from steps of each file that are timed.

        A cell: so many steps, (1 + m) times dearer where a meta-learner is taught, m its clean
        batch over the batch divided by the steps between; a pass over all pairs at its end, and
        over those whose reference no cell before has taken; what it takes to load and to begin.
        """
        timed = {
            pairs: self._time(next(cell for cell in cells if cell.pairs == pairs))
            for pairs in dict.fromkeys(cell.pairs for cell in cells)
        }
        filled = recipe("recommended")
        m = filled["meta_batch_size"] / BATCH / filled["meta_every"]
        seconds, scored = [], set()
        for cell in cells:
            step, rest, train = timed[cell.pairs]
            steps = self.training["num_train_epochs"] * math.ceil(train / BATCH)
            passed = self.sizes.test + train + self.sizes.trusted * _trusts(cell.method)
            if (split := self.shared_key(cell)) not in scored:
                passed += self.sizes.test + self.sizes.trusted
            if (given := (split, cell.labels)) not in scored:
                passed += train
            scored |= {split, given}
            taught = 1 + m * METHODS[cell.method].teaches
            seconds.append(rest + step * (steps * taught + passed / BATCH * FORWARD))
        return (
            f"{len(cells)} runs of {min(seconds) / 60:.1f} to {max(seconds) / 60:.1f} minutes "
            f"each, in all {sum(seconds) / 3600:.1f} hours of one thread, "
            f"{sum(seconds) / 3600 / jobs:.1f} hours with --jobs {jobs}, if the processors are "
            "free: by the time of "
            + ", ".join(
                f"a step of {BATCH} pairs of {str(pairs).partition('@')[0]}, {step:.1f} s"
                for pairs, (step, *_) in timed.items()
            )
            + "."
        )

    def _time(self, cell: Cell) -> tuple[float, float, int]:
        """Return the seconds of a step and of all beside the steps, and the training pairs."""
        began = time.monotonic()
        with TemporaryDirectory() as directory:
            files = self._files(replace(cell, method="dpo"), Path(directory) / "cell")
            rows = load_pairs(files.train).pairs
            train = len(rows)
            write_lines(Path(directory) / "few.jsonl", rows.select(range(TIMED_STEPS * BATCH)))
            few = replace(files, train=str(Path(directory) / "few.jsonl"), clean=None)
            config = self._config(
                cell, method="dpo", max_steps=TIMED_STEPS, reference_cache=directory
            )
            align(few, config)
            lines = (Path(files.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            told = {name: value for line in lines for name, value in json.loads(line).items()}
        training = float(told["train_runtime"])
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
        trusted = str(self._home(*self.shared_key(cell)) / "trusted.jsonl")
        return AlignFiles(
            self.model, str(directory / "noisy.jsonl"), trusted if _trusts(cell.method) else None,
            None, str(directory / "run"),
        )  # fmt: skip

    def _config(self, cell: Cell, **others: Any) -> MSPOConfig:
        return MSPOConfig(**{
            "method": cell.method, "seed": cell.seed, "logging_strategy": "no",
            "save_strategy": "no", "disable_tqdm": True, "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": BATCH, "reference_cache": str(self.home / "reference"),
            **self.training, **others,
        })  # fmt: skip

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


def _trusts(method: str) -> bool:
    """Return whether a method looks at trusted pairs, if only for the noise rate."""
    return bool({"clean", "noise_rate"} & METHODS[method].needs)


def positive_share(margins: Tensor) -> float:
    """Return the share of positive margins (n,), one of zero counting half."""
    return float((margins > 0).double().mean() + (margins == 0).double().mean() / 2)


def interval(margins: Tensor, prompts: Sequence[str]) -> tuple[float, float]:
    """Return the 95% interval of the share of positive margins (n,), whole prompts resampled."""
    right = (margins > 0).double() + (margins == 0).double() / 2

    def share(weights: Tensor) -> Tensor:
        return (weights * right).sum(-1) / weights.sum(-1)

    return bootstrap_interval(share, prompts, RESAMPLES, seed=0)


def label_numbers(method: str, noisy: str, run: Path) -> dict[str, float]:
    """Return the share of wrong labels, the run's estimate of it, and how well its labels tell.

    `label_auroc` is of the mean soft label that a pair was trained with; methods that give all
    pairs one label have none, and neither has the oracle.
    """
    truth = flips_by_uid(noisy)
    record = json.loads((run / RUN_RECORD).read_text(encoding="utf-8"))
    numbers = {"train_pairs": len(truth), "noise_rate": sum(truth.values()) / len(truth)}
    numbers |= noise_rate_estimate(record)
    history = read_table(run / "label_history.parquet", columns=["uid", "soft_label"])
    by_pair = history.group_by("uid").aggregate([("soft_label", "mean")])
    labels = torch.tensor(by_pair["soft_label_mean"].to_pylist())
    is_right = torch.tensor([not truth[uid] for uid in by_pair["uid"].to_pylist()])
    found = auroc(labels, is_right)
    if method != "oracle" and labels.unique().numel() > 1 and not math.isnan(found):
        numbers["label_auroc"] = found
    return numbers
