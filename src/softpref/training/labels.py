"""A run's beliefs about its pairs: the labels it trained with, and those at its end.

Shapes: n training pairs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from pyarrow.json import ParseOptions, read_json
from torch import Tensor

from softpref.algorithm.bilevel import Update
from softpref.algorithm.evidence_labeller import EvidenceLabeller
from softpref.algorithm.labeller import Labeller, MetaLearner
from softpref.algorithm.likelihood import Measured
from softpref.algorithm.posterior_labeller import PosteriorLabeller
from softpref.algorithm.rows import COLUMNS
from softpref.data.label_columns import ties
from softpref.data.readers import column
from softpref.data.temporary import replacing
from softpref.models.scoring import numbers
from softpref.statistics.calibration import Calibration, cross_fit, expected_calibration_error
from softpref.training.metrics import auroc

logger = logging.getLogger(__name__)

_FOLDS = 5
HISTORY = {
    "step": torch.int64,
    "index": torch.int64,
    "ppl_diff": torch.float32,
    "soft_label": torch.float32,
    "margin": torch.float32,
}

NUMBERS = ("ppl_diff", "soft_label", "p_correct", "evidence", "margin")
_SCHEMA = pa.schema(
    [("uid", pa.string()), *((name, pa.float64()) for name in NUMBERS), ("step", pa.int64())]
)


@dataclass
class LabelHistory:
    """Every label as it was trained with, one record a pair and step."""

    _parts: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in HISTORY})

    def record(self, step: int, index: Tensor, ppl_diff: Tensor, update: Update) -> Tensor:
        """Add the labels of one step, and return them, on the host; waits for the device once.

        `index`, on the host, and `ppl_diff` are (B,) in the update's order.
        """
        numbers = torch.stack([ppl_diff, update.soft_label, update.measured.margin]).cpu()
        columns = (torch.full_like(index, step), index, *numbers)
        for (name, dtype), values in zip(HISTORY.items(), columns, strict=True):
            self._parts[name].append(values.to(dtype))
        return numbers[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the columns, each of shape (records,)."""
        for name, parts in self._parts.items():
            self._parts[name] = [torch.cat([torch.empty(0, dtype=HISTORY[name]), *parts])]
        return {name: whole for name, (whole,) in self._parts.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from the columns of an interrupted run."""
        self._parts = {name: [tensors[name]] for name in HISTORY}

    def first_visits(self, of: Tensor, count: int) -> dict[str, Tensor]:
        """Return the columns of the last `count` first records of pairs in `of`, (n,) bool."""
        columns = self.tensors()
        records = len(columns["index"])
        first = torch.full((len(of),), records)
        first.scatter_reduce_(0, columns["index"], torch.arange(records), "amin")
        rows = first[of & (first < records)].sort().values[-count:]
        return {name: values[rows] for name, values in columns.items()}

    def last_steps(self, pairs: int) -> Tensor:
        """Return the step each pair was last trained on, (n,) int64; −1 where never."""
        columns = self.tensors()
        return torch.full((pairs,), -1).scatter_reduce(0, columns["index"], columns["step"], "amax")

    def last_labels(self, pairs: int) -> Tensor:
        """Return the label each pair was last trained with, (seen,), of those that ever were."""
        last = self._last_records(pairs)
        return self.tensors()["soft_label"][last[last >= 0]]

    def latest(self, pairs: Dataset) -> Measured:
        """Return what is known of every pair, (n,), without a pass over them.

        PPLDiff and margin are those of the last step that trained on a pair, just before its
        update, NaN where none did.
        """
        columns, last = self.tensors(), self._last_records(len(pairs))
        unseen = torch.tensor([torch.nan])  # is last, at −1
        seen = {
            name: torch.cat([columns[name], unseen.to(columns[name])])[last]
            for name in ("ppl_diff", "margin")
        }
        return known(pairs, **seen)

    def auroc(self, is_flipped: Tensor | None) -> dict[str, float]:
        """Return `labels/auroc` over the pairs seen so far, each by its latest label.

        Args:
            is_flipped: (n,) as of `known_flips`.

        Returns:
            Nothing while only pairs of one kind were seen, or where the truth is unknown.
        """
        if is_flipped is None:
            return {}
        columns, last = self.tensors(), self._last_records(len(is_flipped))
        seen = (last >= 0) & ~is_flipped.isnan()
        found = auroc(columns["soft_label"][last[seen]], is_flipped[seen] == 0)
        return {} if math.isnan(found) else {"labels/auroc": found}

    def _last_records(self, pairs: int) -> Tensor:
        index = self.tensors()["index"]
        last = torch.full((pairs,), -1)
        return last.scatter_reduce(0, index, torch.arange(len(index)), "amax")

    def write(self, path: Path, uids: pa.ChunkedArray) -> None:
        """Write `label_history.parquet`: uid, step, ppl_diff, soft_label, margin."""
        columns = {name: values.numpy() for name, values in self.tensors().items()}
        index = columns.pop("index")
        table = pa.table({"uid": uids.take(pa.array(index)), **columns})
        with replacing(path) as partial:
            pq.write_table(table, partial)


def known_flips(pairs: Dataset) -> Tensor | None:
    """Return 1 for a flipped label, 0 for a right one, NaN for a tie, (n,); None if not known."""
    if "is_flipped" not in pairs.column_names:
        return None
    is_flipped = numbers(pairs, "is_flipped")
    return is_flipped.double().masked_fill(torch.tensor(ties(pairs)), torch.nan)


def known(pairs: Dataset, **given: Tensor) -> Measured:
    """Return what a data set says of its pairs, (n,); NaN beside that and what is `given`."""
    unknown = torch.full((len(pairs),), torch.nan)
    columns = {name: numbers(pairs, name) for name in COLUMNS if name in pairs.column_names}
    names = (of.name for of in fields(Measured))
    return Measured(**{name: (columns | given).get(name, unknown) for name in names})


def learns_labels(labeller: Labeller) -> bool:
    """Return whether labels come from what training learns, and not from a rule."""
    return isinstance(labeller, MetaLearner | EvidenceLabeller | PosteriorLabeller)


def trusted_numbers(
    labeller: Labeller, clean: Dataset | None, score: Callable[[Dataset, str], Measured]
) -> Measured | None:
    """Return the clean pairs as `beliefs` takes them; only a meta-learner reads a finished policy.

    Args:
        labeller: what made the labels.
        clean: the clean pairs, if any.
        score: measures pairs under the finished policy.
    """
    if clean is None:
        return None
    learns = isinstance(labeller, MetaLearner)
    return score(clean, "labelling, clean") if learns else known(clean)


def beliefs(
    pairs: Dataset,
    steps: Tensor,
    scored: Measured,
    trusted: Measured | None,
    labeller: Labeller,
    noise_rate: float | None,
) -> Dataset:
    """Return what a run believes of every training pair, the rows of `labels.jsonl`.

    `p_correct` is the labeller's evidence put on the scale of a probability with the trusted pairs
    and their swapped copies, the noise rate as prior.

    Args:
        pairs: the training pairs; `p_correct` of a tie is null.
        steps: (n,) the step each was last trained on, −1 for never.
        scored: the pairs under the finished policy, or as they are known without it.
        trusted: the clean pairs likewise; without them `p_correct` is null.
        labeller: what made the labels; `soft_label` is null unless it learns them.
        noise_rate: share of flipped labels; where it is None, `p_correct` is null.
    """
    unknown = pa.nulls(len(pairs))
    soft_label, p_correct = unknown, unknown
    if learns_labels(labeller):
        with torch.no_grad():
            soft_label = pa.array(labeller.label(scored).cpu().numpy())
    if isinstance(labeller, EvidenceLabeller | PosteriorLabeller):
        p_correct = soft_label  # which is a probability
    elif trusted is not None and noise_rate is not None:
        of_trusted = evidence(labeller, trusted)
        calibration = Calibration.fit(of_trusted)
        _say_calibration(of_trusted)
        scores = evidence(labeller, scored)
        p_correct = pa.array(calibration.probability_correct(scores, noise_rate).numpy())
    table = {
        "uid": column(pairs, "uid"),
        "ppl_diff": pa.array(scored.ppl_diff.numpy(), from_pandas=True),  # NaN is null
        "soft_label": soft_label,
        "p_correct": pc.if_else(pa.array(ties(pairs)), None, p_correct),
        "evidence": pa.array(scored.evidence.numpy(), from_pandas=True),
        "margin": pa.array(scored.margin.numpy(), from_pandas=True),
        "step": pa.array(steps.numpy(), mask=steps.numpy() < 0),
    }
    return Dataset(pa.table(table))


def read_labels(path: Path) -> pa.Table:
    """Return the `labels.jsonl` of a run; a uid that looks like a date stays text."""
    return read_json(path, parse_options=ParseOptions(explicit_schema=_SCHEMA))


def _say_calibration(trusted: Tensor) -> None:
    """Log what p_correct is worth on clean pairs left out of its fit, as given and swapped."""
    right = cross_fit(trusted, _FOLDS, torch.Generator().manual_seed(0))
    is_right = torch.arange(2 * len(right)) < len(right)
    both = torch.cat([right, 1 - right])
    skill, error = auroc(both, is_right), expected_calibration_error(both, is_right)
    logger.info(
        f"labels: p_correct ranks clean pairs above swapped ones in {100 * skill:.0f}% of cases "
        f"(50% is chance), calibration error {100 * error:.1f}% (held out, {_FOLDS}-fold)"
    )


def evidence(labeller: Labeller, measured: Measured) -> Tensor:
    """Return an odd score that grows with the belief in a label, (n,).

    It is V's log-odds of a pair against the swapped one; without V, −PPLDiff under the starting
    policy.
    """
    if not isinstance(labeller, MetaLearner):
        return -measured.starting_ppl_diff
    with torch.no_grad():
        return labeller.evidence(measured).cpu()
