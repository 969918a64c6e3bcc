"""What becomes of the columns that say more of a label than one bit, before the first step.

Shapes: n training pairs, m trusted pairs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Set
from typing import Any

from datasets import Dataset
from torch import Tensor

from softpref.columns import LABEL_NUMBERS, SCORES, VOTES, Columns, SoftLabelSource
from softpref.data.label_columns import LABEL, ties
from softpref.data.parsing import ANNOTATOR
from softpref.data.readers import column
from softpref.errors import UsageError
from softpref.models.scoring import numbers
from softpref.statistics.score_temperature import fit_temperature
from softpref.training.preparation import Prepared
from softpref.training.reliabilities import annotator_names

logger = logging.getLogger(__name__)


def with_soft_labels(
    prepared: Prepared, source: SoftLabelSource | None, reads: Set[str]
) -> Prepared:
    """Add `soft_label` to the training pairs by votes or scores, if one of them is the source.

    The other sets lose weights, margins, scores and votes, which only training reads. The record of
    the training pairs gets `columns_read`.

    Args:
        prepared: the tokenized sets.
        source: as the user chose it; None is the column `soft_label`, if there is one.
        reads: the columns that the method reads.

    Raises:
        UsageError: there is no such column, or a temperature cannot be fitted.
    """
    train = prepared.train
    needed = {"soft_label"} if source == "column" else {*Columns(soft_label_from=source).required}
    if missing := sorted(needed - set(train.column_names)):
        raise UsageError(
            f"--soft_label_from {source}: the training pairs have no {' and '.join(missing)}: add "
            "it, or choose another source of labels."
        )
    about: dict[str, Any] = {"from": source or "column"}
    if source in ("votes", "scores"):
        if "soft_label" in train.column_names:
            logger.warning(f"soft_label is not read: --soft_label_from {source} takes its place")
            train = train.remove_columns("soft_label")
        if source == "votes":
            labels = _by_votes(train)
        else:
            labels, about["temperature"] = _by_scores(train, prepared.clean)
        train = train.add_column("soft_label", labels.numpy())
    train = _without(train, (*SCORES, *VOTES))
    record = prepared.record["train"] | {"columns_read": _columns_read(train, about, reads)}
    return dataclasses.replace(
        prepared,
        train=train,
        clean=prepared.clean and _without(prepared.clean, LABEL_NUMBERS),
        evaluation={name: _without(of, LABEL_NUMBERS) for name, of in prepared.evaluation.items()},
        record=prepared.record | {"train": record},
    )


def log_columns_read(prepared: Prepared) -> None:
    """Log what the training pairs bring beside their label, in one line."""
    read = prepared.record["train"]["columns_read"]
    texts = []
    for name, facts in read.items():
        told = (
            f"{what} {of:.3g}" if what == "mean" else f"{what} {of}" for what, of in facts.items()
        )
        texts.append(f"{name} ({', '.join(told)})")
    if texts:
        logger.info("columns read: %s", ", ".join(texts))
    if ANNOTATOR in prepared.train.column_names and ANNOTATOR not in read:
        logger.info("annotator was not read: re_po and audits read it")


def _columns_read(
    train: Dataset, about: dict[str, Any], reads: Set[str]
) -> dict[str, dict[str, Any]]:
    """Return facts about each column that was read, by name."""
    read: dict[str, dict[str, Any]] = {}
    for name in ("weight", "margin", "soft_label"):
        if name in train.column_names:
            facts = about if name == "soft_label" else {}
            read[name] = facts | {"mean": float(numbers(train, name).double().mean())}
    if ANNOTATOR in reads and (names := annotator_names(train)):
        read[ANNOTATOR] = {"names": len(names), "unknown": column(train, ANNOTATOR).null_count}
    if tied := sum(ties(train)):
        read[LABEL] = {"ties": tied}
    return read


def _by_votes(train: Dataset) -> Tensor:
    """Return (for + 1)/(for + against + 2), (n,): the mean of Beta(for + 1, against + 1).

    It is the posterior of the share of voters for the label, with a uniform prior.
    """
    for_, against = (numbers(train, name).double() for name in VOTES)
    _say("votes", for_ - against)
    return (for_ + 1) / (for_ + against + 2)


def _by_scores(train: Dataset, clean: Dataset | None) -> tuple[Tensor, float]:
    """Return σ((s_chosen − s_rejected)/T), (n,), and T, fitted on the trusted pairs."""
    if clean is None or not {*SCORES} <= {*clean.column_names}:
        raise UsageError(
            "--soft_label_from scores fits its temperature on trusted pairs with score_chosen and "
            "score_rejected: give about 150 of them by --clean, or --clean N to hold N training "
            "pairs out."
        )
    differences, trusted = (
        numbers(of, SCORES[0]).double() - numbers(of, SCORES[1]).double() for of in (train, clean)
    )
    try:
        temperature = fit_temperature(trusted)
    except ValueError as error:
        raise UsageError(
            f"--soft_label_from scores: {error} over the {len(trusted)} trusted pairs, so the "
            "scores say nothing of their labels: check the columns, or choose another source."
        ) from None
    _say("scores", differences)
    against = int((trusted < 0).sum())
    logger.info(
        f"scores: T = {temperature:.3g} by {len(trusted)} trusted pairs, {against} of them with "
        "the lower score on the chosen side"
    )
    if not against:
        logger.warning(
            "warning: no trusted pair contradicts the scores, so T rests on its prior: if labels "
            "were made from the scores, give trusted pairs that people reviewed"
        )
    return (differences / temperature).sigmoid(), temperature


def _say(what: str, differences: Tensor) -> None:
    """Log how many pairs have less on the chosen side, and how many as much, of (n,)."""
    below, equal = int((differences < 0).sum()), int((differences == 0).sum())
    logger.info(
        f"{what}: of {len(differences):,} training pairs {below:,} have the lower "
        f"{'score' if what == 'scores' else 'number of votes'} on the chosen side, and {equal:,} "
        "are ties, label 1/2"
    )


def _without(pairs: Dataset, names: tuple[str, ...]) -> Dataset:
    return pairs.remove_columns([name for name in names if name in pairs.column_names])
