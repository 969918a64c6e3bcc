"""What a finished run leaves beside its model: labels, history, record, card and seal."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn

from softpref.algorithm.objective import GEOMETRIC
from softpref.columns import ColumnOptions
from softpref.data.fingerprints import SFT_TARGETS, count_sft_targets
from softpref.data.readers import column, dataset_rows
from softpref.data.temporary import fsync_all
from softpref.markup import for_markdown, shortened
from softpref.models.loading import loaded_from
from softpref.models.quantized import RUN_RECORD, bits_text, quantization_of
from softpref.models.scoring import numbers
from softpref.models.weights import located
from softpref.statistics.noise_rate import NoiseRate, rate_text
from softpref.training.labels import beliefs, known, known_flips, learns_labels
from softpref.training.metrics import auroc
from softpref.training.needs import noise_of_sources
from softpref.training.output import appearing_together, write_lines, write_text
from softpref.training.reliabilities import reliabilities_of
from softpref.training.seals import MANIFEST, write_manifest
from softpref.training.sets import Sets
from softpref.training.teacher import save_meta_learner

if TYPE_CHECKING:
    from softpref.training.trainer import MSPOTrainer

logger = logging.getLogger(__name__)

NOT_ESTIMATED = "not estimated, for want of clean pairs"
FLAT = 0.1
"""Range of 90% of the soft labels below which they say next to nothing about single pairs."""
PATH_OPTIONS = ("output_dir", "reference_cache", "resume_from_checkpoint")
PACKAGES = ("softpref", "torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Origin:
    """What a run was made from, for its record.

    Attributes:
        model: the directory or hub id of the model, empty where it names none.
        files: where model and pairs lie, null for pairs given as objects.
        clean: why the clean pairs are trusted.
        sft_targets: number of pairs of which SFT has seen a response, by set.
    """

    model: str
    files: dict[str, Any]
    clean: str
    sft_targets: dict[str, int]

    @classmethod
    def of(
        cls, model: nn.Module | str, output: str, given: tuple[Any, Any, Any], sets: Sets
    ) -> Origin:
        """Return where a run's arguments come from, and warn of pairs that SFT has seen.

        Args:
            model: the model or its name.
            output: the run's directory.
            given: training, clean and evaluation pairs as given.
            sets: the same pairs, as read.
        """
        name = model if isinstance(model, str) else loaded_from(model)
        files = {"model": located(name) if name else name}
        files |= zip(("train", "clean", "eval"), map(_paths, given), strict=True)
        files |= {"output": located(output), **dataclasses.asdict(ColumnOptions())}
        return cls(name, files, sets.provenance, _count_sft_targets(name, sets))


def _paths(given: Any) -> Any:
    if isinstance(given, str | PathLike):
        return located(str(given))
    if isinstance(given, list | tuple) and all(isinstance(each, str | PathLike) for each in given):
        return [located(str(each)) for each in given]
    return str(given) if type(given) is int else None


def _count_sft_targets(model: str, sets: Sets) -> dict[str, int]:
    named = {"training": sets.train} | ({"clean": sets.clean} if sets.clean else {})
    seen = {name: count_sft_targets(model, of.pairs) if model else 0 for name, of in named.items()}
    for name, count in seen.items():
        if count:
            logger.warning(
                f"warning: the model was fine-tuned on responses of {count} of the {name} pairs, "
                f"{named[name].source}: it finds them likely, right or wrong; "
                "fit SFT on other pairs"
            )
    return seen


def stamps(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return what changes when a file of a directory is written anew."""
    files = directory.iterdir() if directory.is_dir() else ()
    found = {path.name: path.stat() for path in files if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}


def write_run(trainer: MSPOTrainer, output: Path, before: dict[str, tuple[int, ...]]) -> None:
    """Write what a trained run leaves beside its model, and seal both for `audit --run`.

    This takes a pass over the training pairs where `label_pairs` asks for it.

    Args:
        trainer: the run, its model saved; all of its processes call this.
        output: its directory.
        before: the directory's `stamps` before the model was saved; a file of that time that
            stays as it was is not the run's.
    """
    labels = _labels(trainer)
    if not trainer.ranks.is_first:
        return
    if labels:
        _write_labels(output, labels, trainer.pairs)
        _say_labels(labels, trainer.pairs)
    if learns_labels(trainer.start.labeller) and trainer.method.loss is GEOMETRIC:
        _warn_of_flat(trainer.history.last_labels(len(trainer.pairs)), trainer.args.beta)
    trainer.history.write(output / "label_history.parquet", column(trainer.pairs, "uid"))
    if trainer.teacher:
        save_meta_learner(trainer.teacher.meta_learner, output)
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    # Sorted, as the lines that a resumed run has from its checkpoint are.
    lines = (dict(sorted(line.items())) for line in trainer.state.log_history)
    write_lines(output / "metrics.jsonl", lines)
    if trainer.origin.model and (Path(trainer.origin.model) / SFT_TARGETS).is_file():
        shutil.copy(Path(trainer.origin.model) / SFT_TARGETS, output)
    record = run_record(trainer)
    fsync_all(output)
    others = {"README.md", MANIFEST, RUN_RECORD}  # a model card is there to be edited
    written = [name for name, stamp in stamps(output).items() if before.get(name) != stamp]
    with appearing_together(output, RUN_RECORD) as home:
        write_text(home / "README.md", model_card(record))
        write_text(home / RUN_RECORD, json.dumps(record, indent=2) + "\n")
        own = {name: output / name for name in written if not name.endswith(".partial")}
        own = {name: path for name, path in own.items() if name not in others}
        write_manifest(home, own | {RUN_RECORD: home / RUN_RECORD})
    logger.info("written: %s", output)


def _labels(trainer: MSPOTrainer) -> Dataset | None:
    if trainer.args.label_pairs is False:
        return None
    if trainer.args.label_pairs or learns_labels(trainer.start.labeller):
        return trainer.label_pairs()
    logger.info(
        f"labels: {trainer.args.method} learned none, so ppl_diff and margin are those of each "
        "pair's last step; --label_pairs true takes them from the finished policy, in one more pass"
    )
    return beliefs(
        trainer.pairs,
        trainer.history.last_steps(len(trainer.pairs)),
        trainer.history.latest(trainer.pairs),
        known(trainer.clean) if trainer.clean else None,
        trainer.start.labeller,
        trainer.start.prior,
    )


def _write_labels(output: Path, labels: Dataset, pairs: Dataset) -> None:
    if "source" in pairs.column_names:
        labels = concatenate_datasets([labels, pairs.select_columns(["source"])], axis=1)
    write_lines(output / "labels.jsonl", dataset_rows(labels))


def _warn_of_flat(trained_with: Tensor, beta: float) -> None:
    """Warn where the labels of all pairs, (n,), were nearly the same in the geometric loss."""
    if not len(trained_with):
        return
    low, high = trained_with.double().quantile(torch.tensor([0.05, 0.95]).double()).tolist()
    if high - low < FLAT:
        logger.warning(
            f"labels: nearly the same for all pairs, {low:.2f} to {high:.2f}: this was "
            f"about DPO at β = {beta * abs(low + high - 1):.3g}"
        )


def _say_labels(labels: Dataset, pairs: Dataset) -> None:
    if labels["soft_label"][0] is not None:
        soft_label = numbers(labels, "soft_label")
        logger.info(
            "labels: mean soft label %.2f; %.1f%% of the pairs below one half",
            soft_label.mean(),
            100 * (soft_label < 0.5).float().mean(),
        )
    is_flipped = known_flips(pairs)
    if column(labels, "p_correct").null_count == len(labels) or is_flipped is None:
        return
    either = ~is_flipped.isnan()
    p_correct = numbers(labels, "p_correct")[either]
    found = auroc(p_correct, is_flipped[either] == 0)
    if not math.isnan(found):
        logger.info(
            "labels: p_correct distinguishes right from flipped labels with AUROC %.3f", found
        )


def read_record(run: Path) -> Any:
    """Return the record of a finished run."""
    return json.loads((run / RUN_RECORD).read_text(encoding="utf-8"))


def run_record(trainer: MSPOTrainer) -> dict[str, Any]:
    """Return the resolved options, versions, seeds and data of a run.

    What lies here is named by its absolute path, so that it is found from anywhere.
    """
    noise, correction = trainer.start.noise, trainer.start.correction
    rates = noise_of_sources(trainer.pairs, trainer.clean)
    options = trainer.args.to_dict()
    data = trainer.start.sets.record.items()
    return {
        "format": 1,
        "files": trainer.origin.files,
        "method": trainer.args.method,
        "source": trainer.method.source,
        "options": options | {name: located(options[name] or "") or None for name in PATH_OPTIONS},
        "meta_lr": trainer.teacher.optimizer.param_groups[0]["lr"] if trainer.teacher else None,
        "data": {
            name: told
            | {"source": located(told["source"])}
            | _sources(told, rates if name == "train" else {})
            for name, told in data
        },
        "clean_pairs": trainer.origin.clean,
        "sft_targets_among_pairs": trainer.origin.sft_targets,
        "noise_rate": noise.record() if noise else None,
        "noise_rate_source": _noise_rate_source(trainer),
        "quantization": quantization_of(trainer.policy),
        "evidence_speaks": trainer.start.evidence.speaks if trainer.start.evidence else None,
        "perpcorrect": correction.record() if correction else None,
        "reliability": reliabilities_of(trainer.start.labeller, trainer.pairs),
        "evaluation": trainer.evaluated,
        "steps": trainer.state.global_step,
        "threads": torch.get_num_threads(),
        "device": str(trainer.args.device),
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _sources(told: dict[str, Any], rates: Mapping[str, NoiseRate]) -> dict[str, Any]:
    """Return what is recorded of each source, with its noise rate, where there are several."""
    if "sources" not in told:
        return {}
    recorded = []
    for of in told["sources"]:
        rate = rates.get(of["source"])
        noise = rate.record() if rate else None
        recorded.append(of | {"source": located(of["source"]), "noise_rate": noise})
    return {"sources": recorded}


def _noise_rate_source(trainer: MSPOTrainer) -> str | None:
    if trainer.start.noise is None:
        return None
    if trainer.args.noise_rate is not None:
        return "given"
    return "perpcorrect's fit" if trainer.start.correction else "estimated"


def _named(source: str) -> str:
    return for_markdown(shortened(Path(source).name))


def _rate_text(noise: dict[str, Any] | None) -> str:
    return rate_text(noise["rate"], noise["low"], noise["high"]) if noise else NOT_ESTIMATED


def model_card(record: dict[str, Any]) -> str:
    """Return the model card of a run, in the hub's format."""
    method, base, noise = record["method"], record["files"]["model"], record["noise_rate"]
    options = record["options"]
    library = "peft" if options["tuning"] == "lora" else "transformers"
    tuning = f"{options['tuning']} tuning"
    if quantization := record.get("quantization"):
        tuning += f" over a base in {bits_text(quantization)}"
    rate = _rate_text(noise)
    if record["noise_rate_source"] not in (None, "estimated"):
        rate = f"{noise['rate']:.1%} ({record['noise_rate_source']})"
    pairs = record["data"]["train"]["pairs"]
    by_source = "".join(
        f"| of the {of['pairs']:,} from {_named(of['source'])} | {_rate_text(of['noise_rate'])} |\n"
        for of in record["data"]["train"].get("sources", [])
    )
    clean = record["data"].get("clean", {}).get("pairs", 0)
    labels = "`label_history.parquet` holds every label as it was trained with.\n"
    if options["label_pairs"] is not False:
        labels = (
            f"`labels.jsonl` says how far the run believes every training pair's label.\n{labels}"
        )
    # The hub refuses a card whose base model is a local path.
    base_model = "" if Path(base).is_absolute() else f"base_model: {json.dumps(base)}\n"
    return f"""---
{base_model}library_name: {library}
tags: [softpref, {method}, preference-alignment]
---

# {_named(base)} aligned with {method}

Made by softpref {record["versions"]["softpref"]}: method `{method}` ({record["source"]}), recipe
`{options["recipe"]}`, {tuning}, β = {options["beta"]}, {record["steps"]} steps.

| | |
|---|---|
| training pairs | {pairs:,} |
| clean pairs | {clean:,} ({record["clean_pairs"]}) |
| wrong labels among the training pairs | {rate} |
{by_source}
{labels}`run.json` says how to repeat the run. Nothing here was judged for quality or safety.
"""
