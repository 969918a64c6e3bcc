"""`softpref train`: files and options to an output directory that holds the whole run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from softpref.columns import ColumnOptions
from softpref.data.bad_rows import OnBadRow
from softpref.data.fingerprints import SFT_TARGETS, count_sft_targets
from softpref.data.mixing import MIX, mixed, shares_of
from softpref.data.readers import column, dataset_rows
from softpref.data.sources import LoadedPairs, load_pairs, names_of, subset
from softpref.data.splits import hold_out_clean
from softpref.data.temporary import fsync_all
from softpref.errors import UsageError
from softpref.markup import for_markdown, shortened
from softpref.models.weights import located
from softpref.options import option, require
from softpref.places import directory_to_write
from softpref.statistics.noise_rate import rate_text
from softpref.training.config import MSPOConfig
from softpref.training.labels import known_flips
from softpref.training.metrics import auroc
from softpref.training.needs import noise_of_sources
from softpref.training.output import (
    appearing_together,
    first_writes,
    resume_point,
    run_directory,
    write_lines,
    write_text,
)
from softpref.training.publishing import sealed_files, upload_sealed
from softpref.training.seals import MANIFEST, write_manifest
from softpref.training.teacher import save_meta_learner
from softpref.training.trainer import MSPOTrainer

logger = logging.getLogger(__name__)

RUN_RECORD = "run.json"
NOT_ESTIMATED = "not estimated, for want of clean pairs"
FLAT = 0.1
"""Range of 90% of the soft labels below which they say next to nothing about single pairs."""
PATH_OPTIONS = ("output_dir", "reference_cache", "resume_from_checkpoint")
PACKAGES = ("softpref", "torch", "transformers", "peft", "accelerate", "datasets")


@dataclass
class AlignFiles(ColumnOptions):
    """What a run reads and where it writes."""

    model: str = option("The SFT model to start from: a directory or hub id, full or adapter.", "")
    train: list[str] | str = option(
        "Noisy pairs: JSONL, JSON, Parquet, CSV or hub id; several files are one set.", ""
    )
    clean: str | None = option("Trusted pairs: a file, or a number of training pairs to hold out.")
    eval: str | None = option("Pairs to evaluate on at the end, and on the way by --eval_strategy.")
    output: str = option("Directory for the run; new, or of the same command, interrupted.", "")
    mix: list[float] | None = option(MIX)


def load_sets(
    files: AlignFiles, on_bad_row: OnBadRow, seed: int
) -> tuple[LoadedPairs, LoadedPairs | None, LoadedPairs | None, str]:
    """Read training, clean and evaluation pairs; say where the trust in the clean is from.

    Raises:
        UsageError: a file cannot be read, or `--clean` names neither a file nor a possible number.
    """
    read = partial(load_pairs, on_bad_row=on_bad_row, columns=files.columns())
    shares = shares_of(names_of(files.train), files.mix) if files.mix else None
    train = read(files.train)
    evaluation = read(files.eval) if files.eval else None
    in_file = files.clean is not None and not files.clean.lstrip("-").isdigit()
    clean = read(str(files.clean)) if in_file else None
    if shares:
        train = mixed(train, shares, seed, clean)
    if files.clean is None:
        return train, None, evaluation, "none given"
    if clean:
        return train, clean, evaluation, "given as a file"
    rest, held_out, provenance = hold_out_clean(train.pairs, int(files.clean), seed)
    clean = subset(train, held_out, f"{train.source} ({files.clean} held out)")
    clean = dataclasses.replace(
        clean, bad_rows=(), fingerprints={clean.source: clean.fingerprint}, also_clean=0
    )
    return subset(train, rest, train.source), clean, evaluation, provenance


def align(files: AlignFiles, config: MSPOConfig) -> None:
    """Align a model and write everything a run leaves behind.

    The output directory gets the model or adapter with its tokenizer, `labels.jsonl`,
    `label_history.parquet`, `meta_learner.safetensors`, `metrics.jsonl`, `run.json` (options,
    versions, seeds, data), a model card and `manifest.json`, which seals the rest.

    Raises:
        UsageError: something is wrong with data, model or options; nothing was written.
    """
    for name in ("model", "train", "output"):
        require(getattr(files, name), f"--{name}")
    if config.output_dir not in (None, "trainer_output"):
        raise UsageError("--output_dir: write --output.")
    with first_writes(directory_to_write(files.output), config.process_index):
        output, config.resume_from_checkpoint = run_directory(
            files.output, config.resume_from_checkpoint, finished=RUN_RECORD
        )
        _align_into(output, files, config)


def _align_into(output: Path, files: AlignFiles, config: MSPOConfig) -> None:
    config.output_dir = str(output)
    train, clean, evaluation, provenance = load_sets(files, config.on_bad_row, config.seed)
    if clean and files.clean and clean.source != files.clean:
        logger.warning("clean: %s pairs held out of --train, %s", files.clean, provenance)
    seen = _count_sft_targets(files.model, train, clean)
    trainer = MSPOTrainer(files.model, config, train, clean, evaluation)
    for name, rate in noise_of_sources(trainer.pairs, trainer.clean).items():
        logger.info("noise rate of %s: %s", name, rate)
    trainer.train(resume_from_checkpoint=resume_point(config.resume_from_checkpoint))
    trainer.save_model(_internal_call=True)  # by which nothing is pushed yet
    trainer.save_state()
    labels = trainer.label_pairs() if config.label_pairs else None
    evaluation_metrics = trainer.evaluate() if evaluation else None
    if not trainer.ranks.is_first:
        return
    if labels:
        _write_labels(output, labels, trainer.pairs)
        _say_labels(labels, trainer.pairs, config.beta)
    trainer.history.write(output / "label_history.parquet", column(trainer.pairs, "uid"))
    if trainer.teacher:
        save_meta_learner(trainer.teacher.meta_learner, output)
    if evaluation_metrics:
        loss, right = (evaluation_metrics[f"eval_{n}"] for n in ("loss", "rewards/accuracies"))
        logger.info(
            f"eval: loss {loss:.4f}; the implicit reward prefers the response labelled better in "
            f"{100 * right:.1f}% of the pairs of {files.eval}"
        )
    # Sorted, as the lines that a resumed run has from its checkpoint are.
    lines = (dict(sorted(line.items())) for line in trainer.state.log_history)
    write_lines(output / "metrics.jsonl", lines)
    if (Path(files.model) / SFT_TARGETS).is_file():
        shutil.copy(Path(files.model) / SFT_TARGETS, output)
    record = run_record(trainer, files, provenance, seen) | {"evaluation": evaluation_metrics}
    fsync_all(output)
    with appearing_together(output, RUN_RECORD) as home:
        write_text(home / "README.md", model_card(record))
        write_text(home / RUN_RECORD, json.dumps(record, indent=2) + "\n")
        write_manifest(home, _to_seal(output) | {RUN_RECORD: home / RUN_RECORD})
    logger.info("written: %s", output)
    if config.push_to_hub:
        _push(output, str(trainer.hub_model_id), config)


def _push(output: Path, repo: str, config: MSPOConfig) -> None:
    token, revision = config.hub_token, config.hub_revision
    try:
        upload_sealed(sealed_files(output), repo, "model", token=token, revision=revision)
    except UsageError as error:
        raise UsageError(f"{error} The run is complete: softpref push {output} {repo}.") from error


def _write_labels(output: Path, labels: Dataset, pairs: Dataset) -> None:
    if "source" in pairs.column_names:
        labels = concatenate_datasets([labels, pairs.select_columns(["source"])], axis=1)
    write_lines(output / "labels.jsonl", dataset_rows(labels))


def _to_seal(output: Path) -> dict[str, Path]:
    """Return a run's files; a model card is there to be edited."""
    files = {path.name: path for path in output.iterdir() if path.is_file()}
    others = {"README.md", MANIFEST} | {name for name in files if name.endswith(".partial")}
    return {name: path for name, path in files.items() if name not in others}


def _count_sft_targets(model: str, train: LoadedPairs, clean: LoadedPairs | None) -> dict[str, int]:
    sets = {name: of for name, of in (("training", train), ("clean", clean)) if of}
    seen = {name: count_sft_targets(model, loaded.pairs) for name, loaded in sets.items()}
    for name, count in seen.items():
        if count:
            logger.warning(
                f"warning: the model was fine-tuned on responses of {count} of the {name} pairs, "
                f"{sets[name].source}: it finds them likely, right or wrong; fit SFT on other pairs"
            )
    return seen


def _say_labels(labels: Dataset, pairs: Dataset, beta: float) -> None:
    if labels["soft_label"][0] is not None:
        soft_label = torch.tensor(column(labels, "soft_label").to_numpy())
        logger.info(
            "labels: mean soft label %.2f; %.1f%% of the pairs below one half",
            soft_label.mean(),
            100 * (soft_label < 0.5).float().mean(),
        )
        low, high = soft_label.double().quantile(torch.tensor([0.05, 0.95]).double()).tolist()
        if high - low < FLAT:
            logger.warning(
                f"labels: nearly the same for all pairs, {low:.2f} to {high:.2f}: nothing "
                "distinguished wrong labels from right ones, and this was about DPO at "
                f"β = {beta * abs(low + high - 1):.3g}"
            )
    is_flipped = known_flips(pairs)
    if labels["p_correct"][0] is None or is_flipped is None:
        return
    if 0 < is_flipped.sum() < len(is_flipped):
        found = auroc(torch.tensor(column(labels, "p_correct").to_numpy()), ~is_flipped)
        logger.info(
            "labels: p_correct distinguishes right from flipped labels with AUROC %.3f", found
        )


def run_record(
    trainer: MSPOTrainer, files: AlignFiles, provenance: str, sft_targets: dict[str, int]
) -> dict[str, Any]:
    """Return the resolved options, versions, seeds and data of a run.

    What lies here is named by its absolute path, so that it is found from anywhere.
    """
    noise, correction = trainer.start.noise, trainer.start.correction
    options = trainer.args.to_dict()
    data = trainer.start.sets.record.items()
    return {
        "format": 1,
        "files": _located_files(files),
        "method": trainer.args.method,
        "source": trainer.method.source,
        "options": options | {name: located(options[name] or "") or None for name in PATH_OPTIONS},
        "meta_lr": trainer.teacher.optimizer.param_groups[0]["lr"] if trainer.teacher else None,
        "data": {
            name: told | {"source": located(told["source"])} | _sources(told, trainer)
            for name, told in data
        },
        "clean_pairs": provenance,
        "sft_targets_among_pairs": sft_targets,
        "noise_rate": noise.record() if noise else None,
        "noise_rate_source": _noise_rate_source(trainer),
        "evidence_speaks": trainer.start.evidence.speaks if trainer.start.evidence else None,
        "perpcorrect": correction.record() if correction else None,
        "steps": trainer.state.global_step,
        "threads": torch.get_num_threads(),
        "device": str(trainer.args.device),
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _sources(told: dict[str, Any], trainer: MSPOTrainer) -> dict[str, Any]:
    """Return what is recorded of each source, with its noise rate, where there are several."""
    if "sources" not in told:
        return {}
    rates = noise_of_sources(trainer.pairs, trainer.clean)
    recorded = []
    for of in told["sources"]:
        rate = rates.get(of["source"])
        noise = rate.record() if rate else None
        recorded.append(of | {"source": located(of["source"]), "noise_rate": noise})
    return {"sources": recorded}


def _located_files(files: AlignFiles) -> dict[str, Any]:
    named = dataclasses.asdict(files)
    train = [located(name) for name in names_of(files.train)]
    paths: dict[str, Any] = {
        name: located(value) for name, value in named.items() if isinstance(value, str)
    }
    paths["train"] = train if len(train) > 1 else train[0]
    if not files.mix:
        del named["mix"]
    if files.clean and files.clean.isdigit():
        paths["clean"] = files.clean  # so many training pairs, whatever a file is called
    return named | paths


def _noise_rate_source(trainer: MSPOTrainer) -> str:
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
    rate = _rate_text(noise)
    if record["noise_rate_source"] != "estimated":
        rate = f"{noise['rate']:.1%} ({record['noise_rate_source']})"
    pairs = record["data"]["train"]["pairs"]
    by_source = "".join(
        f"| of the {of['pairs']:,} from {_named(of['source'])} | {_rate_text(of['noise_rate'])} |\n"
        for of in record["data"]["train"].get("sources", [])
    )
    clean = record["data"].get("clean", {}).get("pairs", 0)
    labels = "`label_history.parquet` holds every label as it was trained with.\n"
    if options["label_pairs"]:
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
`{options["recipe"]}`, {options["tuning"]} tuning, β = {options["beta"]}, {record["steps"]} steps.

| | |
|---|---|
| training pairs | {pairs:,} |
| clean pairs | {clean:,} ({record["clean_pairs"]}) |
| wrong labels among the training pairs | {rate} |
{by_source}
{labels}`run.json` says how to repeat the run. Nothing here was judged for quality or safety.
"""
