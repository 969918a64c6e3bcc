"""`softpref train`: files and options to an output directory that holds the whole run."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from softpref.columns import ColumnOptions, SoftLabelSource
from softpref.data.bad_rows import OnBadRow
from softpref.data.mixing import MIX
from softpref.data.sources import names_of
from softpref.errors import UsageError
from softpref.models.quantized import RUN_RECORD
from softpref.models.weights import located
from softpref.options import option, require
from softpref.places import directory_to_write
from softpref.training.config import MSPOConfig
from softpref.training.needs import noise_of_sources
from softpref.training.output import first_writes, resume_point, run_directory
from softpref.training.progress_lines import show_progress_lines
from softpref.training.sets import EVAL, Sets, held_out_count, read_sets
from softpref.training.trainer import MSPOTrainer

logger = logging.getLogger(__name__)


@dataclass
class AlignFiles(ColumnOptions):
    """What a run reads and where it writes."""

    GROUP: ClassVar[str] = "data"

    model: str = option(
        "The SFT model to start from: a directory or hub id, full or adapter.",
        "",
        required=True,
        metavar="DIR|ID",
    )
    train: list[str] | str = option(
        "Noisy pairs: JSONL, JSON, Parquet, CSV or hub id; several files are one set.",
        "",
        required=True,
        metavar="FILE",
    )
    clean: str | None = option(
        "Trusted pairs: a file, or a number of training pairs to hold out.", metavar="FILE|N"
    )
    eval: str | None = option(
        "Pairs to evaluate on at the end, and on the way by --eval_strategy.", metavar="FILE"
    )
    output: str = option(
        "Directory for the run; new, or of the same command, interrupted.",
        "",
        required=True,
        unless="dry_run",
        metavar="DIR",
    )
    mix: list[float] | None = option(MIX, metavar="SHARE")
    dry_run: bool = option(
        "Read the data, load the model, log steps, memory and time, and stop.",
        False,
        group="output",
    )


def load_sets(
    files: AlignFiles,
    on_bad_row: OnBadRow,
    seed: int,
    soft_label_from: SoftLabelSource | None = None,
) -> Sets:
    """Read training, clean and evaluation pairs.

    Raises:
        UsageError: a file cannot be read, or `--clean` names neither a file nor a possible number.
    """
    columns = files.columns().of_training(soft_label_from)
    return read_sets(files.train, files.clean, files.eval, on_bad_row, seed, files.mix, columns)


def align(files: AlignFiles, config: MSPOConfig) -> None:
    """Align a model and write everything a run leaves behind.

    The output directory gets the model or adapter with its tokenizer, `labels.jsonl`,
    `label_history.parquet`, `meta_learner.safetensors`, `metrics.jsonl`, `run.json` (options,
    versions, seeds, data), a model card and `manifest.json`, which seals the rest.

    Raises:
        UsageError: something is wrong with data, model or options; nothing was written.
    """
    require(files)
    if config.output_dir not in (None, "trainer_output"):
        raise UsageError("--output_dir: write --output.")
    with first_writes(directory_to_write(files.output), config.process_index):
        output, config.resume_from_checkpoint = run_directory(
            files.output, config.resume_from_checkpoint, finished=RUN_RECORD
        )
        config.output_dir = str(output)
        sets = load_sets(files, config.on_bad_row, config.seed, config.soft_label_from)
        if sets.is_held_out:
            logger.warning(
                "clean: %s pairs held out of the training pairs, %s", files.clean, sets.provenance
            )
        evaluation = sets.evaluation.get(EVAL)
        trainer = MSPOTrainer(files.model, config, sets.train, sets.clean, evaluation)
        trainer.origin = dataclasses.replace(
            trainer.origin, files=_located_files(files), clean=sets.provenance
        )
        _train(trainer, files.eval)


def _train(trainer: MSPOTrainer, evaluation: str | None) -> None:
    """Train, evaluate on the file of evaluation pairs, and save."""
    show_progress_lines(trainer)
    for name, rate in noise_of_sources(trainer.pairs, trainer.clean).items():
        logger.info("noise rate of %s: %s", name, rate)
    trainer.train(resume_from_checkpoint=resume_point(trainer.args.resume_from_checkpoint))
    if evaluation:
        metrics = trainer.evaluated or trainer.evaluate()  # at the last step perhaps already
        loss, right = (metrics[f"eval_{n}"] for n in ("loss", "rewards/accuracies"))
        logger.info(
            f"eval: loss {loss:.4f}; the implicit reward prefers the response labelled better in "
            f"{100 * right:.1f}% of the pairs of {evaluation}"
        )
    trainer.save_model()


def _located_files(files: AlignFiles) -> dict[str, Any]:
    named = dataclasses.asdict(files)
    train = [located(name) for name in names_of(files.train)]
    paths: dict[str, Any] = {
        name: located(named[name]) for name in ("model", "clean", "eval", "output") if named[name]
    }
    paths["train"] = train if len(train) > 1 else train[0]
    del named["dry_run"]
    if not files.mix:
        del named["mix"]
    if held_out_count(files.clean) is not None:
        paths["clean"] = files.clean  # so many training pairs, whatever a file is called
    return named | paths
