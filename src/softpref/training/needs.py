"""What a method must know of the data before the first step, and the words where it is missing."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import cast

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from softpref.algorithm.labeller import Labeller
from softpref.algorithm.methods import METHODS, KnownBeforeTraining, Method
from softpref.algorithm.signals import EVIDENCE, STARTING_PPL_DIFF
from softpref.data.label_columns import labelled, ties
from softpref.data.readers import column
from softpref.errors import UsageError
from softpref.models.scoring import starting_ppl_diff, starting_signals
from softpref.statistics.evidence import Evidence
from softpref.statistics.noise_rate import NoiseRate, estimate_noise_rate
from softpref.training.perpcorrect.rounds import Correction
from softpref.training.preparation import Prepared
from softpref.training.reliabilities import annotator_names
from softpref.training.teacher import Teacher

logger = logging.getLogger(__name__)

NO_CLEAN = "give about 150 pairs you trust by --clean, or --clean N to hold N training pairs out"


def require_needs(
    method: Method, prepared: Prepared, noise_rate: float | None, meta_batch_size: int | None
) -> None:
    """Stop where the sets lack what the method needs.

    Args:
        method: of the run.
        prepared: its sets.
        noise_rate: as given by the user.
        meta_batch_size: clean pairs of one meta-update, of methods that teach.

    Raises:
        UsageError: there are no clean pairs, too few of them, no way to a noise rate, no truth for
            `oracle`, ties or weights of 0 only, or a column or rate that would not be read.
    """
    clean = prepared.clean
    columns = prepared.train.column_names
    if "clean" in method.needs and clean is None:
        raise UsageError(f"--method {method.name} learns from clean pairs: {NO_CLEAN}.")
    by_itself = method.given_by == "soft_label" and "soft_label" in prepared.train.column_names
    if "noise_rate" in method.needs and clean is None and noise_rate is None and not by_itself:
        raise UsageError(
            f"--method {method.name} must know the share of flipped labels: give it by "
            f"--noise_rate, or, to have it estimated, {NO_CLEAN}."
        )
    if by_itself and noise_rate is not None:
        raise UsageError(
            "the training pairs bring `soft_label`, so --noise_rate would not be read: omit the "
            "option, or drop the column."
        )
    if method.teaches and clean is not None and (meta_batch_size or 0) > len(clean):
        raise UsageError(
            f"a meta batch of {meta_batch_size} (--meta_batch_size, or the recipe's) is "
            f"larger than the clean set of {len(clean)}: lower it, or give more clean pairs."
        )
    if method.given_by == "is_flipped" and "is_flipped" not in columns:
        raise UsageError(
            f"--method {method.name} reads the truth, and the training pairs carry no "
            "`is_flipped`: make them with `softpref inject`, or choose another method."
        )
    for name in ("soft_label", "weight", "margin"):
        if name in columns and name not in method.reads:
            *others, last = (each.name for each in METHODS.values() if name in each.reads)
            raise UsageError(
                f"the training pairs carry `{name}`, which --method {method.name} does not read: "
                f"drop the column, or choose {', '.join(others)} or {last}."
            )
    if all(ties(prepared.train)):
        raise UsageError(
            "every training pair is a tie, so nothing would be learned: add pairs of which one "
            "response is better."
        )
    if "weight" in columns and not column(prepared.train, "weight").to_numpy().any():
        raise UsageError(
            "the `weight` of every training pair is 0, so nothing would be learned: give weights "
            "above 0, or drop the column."
        )


def with_given_labels(
    pairs: Dataset, method: Method, correction: Correction | None, beta: float
) -> Dataset:
    """Add `given_label` if some pairs have one, and make `margin` a target for h, divided by β.

    It is 1/2 for a tie. For the others it is what the correction found, or the column that the
    method reads: `soft_label`, or for `oracle` 1, and 0 for a flipped pair; NaN where there is
    neither.
    """
    if "margin" in pairs.column_names:
        target = column(pairs, "margin").to_numpy() / beta
        pairs = pairs.remove_columns("margin").add_column("target_margin", target)
    labels, tied = np.full(len(pairs), math.nan), ties(pairs)
    if correction is not None:
        labels[~np.array(tied)] = correction.labels.double().numpy()
    elif method.given_by in pairs.column_names:
        given = column(pairs, cast(str, method.given_by))
        given = pc.if_else(given, 0.0, 1.0) if method.given_by == "is_flipped" else given
        labels = given.to_numpy()
    elif not any(tied):
        return pairs
    return pairs.add_column("given_label", np.where(tied, 0.5, labels))


def noise_of(
    given: float | None,
    prepared: Prepared,
    correction: Correction | None,
    evidence: Evidence | None,
) -> NoiseRate | None:
    """Return the noise rate and say where it is from.

    It is as given, as the correction or the evidence found it, or estimated from PPLDiff; unknown
    where evidence does not speak.
    """
    if given is not None:
        logger.info("noise rate: %.1f%%, as given", 100 * given)
        return NoiseRate.given(given)
    if correction is not None:
        logger.info("noise rate: %.1f%%, 1 − α of the round kept", 100 * correction.noise_rate)
        return NoiseRate.given(correction.noise_rate)
    if prepared.clean is None:
        return None
    if evidence is not None:
        noise = evidence.noise if evidence.speaks else NoiseRate.unknown()
    else:
        sets = (labelled(prepared.train), prepared.clean)
        noise = estimate_noise_rate(*map(starting_ppl_diff, sets))
    logger.info("noise rate: %s", noise)
    return noise


def noise_by_source(
    pairs: Dataset, doubts: Tensor, trusted: Tensor, rates: Tensor | None = None
) -> dict[str, NoiseRate]:
    """Return the noise rate of each source by the same trusted pairs, where there are several.

    Args:
        pairs: noisy pairs.
        doubts: (n,) odd, larger where a label looks wrong: PPLDiff, or minus evidence.
        trusted: (m,) the same of the trusted pairs.
        rates: (n,) ε by pair, where evidence fitted one for each.
    """
    if "source" not in pairs.column_names:
        return {}
    sources, found = column(pairs, "source").to_numpy(), {}
    for name in dict.fromkeys(sources):
        of = torch.from_numpy(sources == name)
        found[name] = estimate_noise_rate(doubts[of], trusted)
        if rates is not None and rates.min() < rates.max():
            found[name] = found[name].around(float(rates[of].mean()))
    return found


def noise_of_sources(pairs: Dataset, clean: Dataset | None) -> dict[str, NoiseRate]:
    """Return `noise_by_source` by evidence, or by PPLDiff where none was fitted."""
    if clean is None:
        return {}
    pairs = labelled(pairs)
    signal = EVIDENCE if "evidence" in pairs.column_names else STARTING_PPL_DIFF
    doubts, trusted = (starting_signals(some, [signal]).squeeze(-1) for some in (pairs, clean))
    sign = -1 if signal is EVIDENCE else 1
    return noise_by_source(pairs, sign * doubts, sign * trusted)


def labeller_of(
    method: Method,
    prepared: Prepared,
    noise: NoiseRate | None,
    teacher: Teacher | None,
    evidence: Evidence | None,
    beta: float,
) -> Labeller:
    """Return what says how far to believe a pair: the teacher's meta-learner where there is one.

    Raises:
        UsageError: it cannot be made from what the data say.
    """
    if teacher or method.make_labeller is None:
        return cast(Teacher, teacher).meta_learner
    clean = starting_ppl_diff(prepared.clean) if prepared.clean else torch.empty(0)
    speaks = evidence is not None and evidence.speaks
    rate, annotators = noise.expected if noise else math.nan, annotator_names(prepared.train)
    known = KnownBeforeTraining(rate, clean, speaks, beta, len(annotators))
    if evidence is not None and not speaks:
        logger.warning("labels: all are taken at their word: this is DPO")
    if method.given_by == "soft_label" and "soft_label" in prepared.train.column_names:
        logger.info("labels: soft_label of the pairs themselves")
        known = dataclasses.replace(known, noise_rate=0.0)  # of which nothing is made
    elif "noise_rate" in method.needs and (evidence is None or speaks):
        logger.info("noise rate that %s assumes: %.1f%%", method.name, 100 * known.noise_rate)
    try:
        return method.make_labeller(known)
    except ValueError as error:
        raise UsageError(f"--method {method.name}: {error}.") from None
