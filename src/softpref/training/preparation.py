"""Data sets as given to the pairs a run trains on, learns from and is measured by."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from softpref.data.bad_rows import OnBadRow, place
from softpref.data.sources import LoadedPairs, by_source
from softpref.data.splits import refuse_overlap, removed_by_source, shared_counts, without_clean
from softpref.data.tokens import TokenizedPairs, tokenize_pairs
from softpref.errors import UsageError
from softpref.models.soundness import require_known_tokens_of_pairs, require_sound
from softpref.statistics.noise_rate import FEWEST_CLEAN_PAIRS

logger = logging.getLogger(__name__)

LEFT_OUT_NAMED = 10
REMARKS = {
    "also_clean": "are clean pairs too and were removed from training",
    "contradicting": "are labelled both ways (kept: that is noise)",
    "duplicates": "repeat an earlier row",
    "truncated": "have a response cut at max_length, or at the model's context",
    "split_boundaries": "have a token that straddles prompt and response",
    "ends_without_eos": "responses do not end with EOS: the chat template leaves it out",
}


@dataclass(frozen=True)
class Prepared:
    """Tokenized pairs, disjoint as they must be, and what was counted on the way.

    Attributes:
        train: the pairs to train on, without those that are clean pairs too.
        clean: the trusted pairs, None where none were given.
        evaluation: the pairs to evaluate on, by the prefix of their metrics.
        record: for each set its source, fingerprint and counts, for the run's record.
    """

    train: Dataset
    clean: Dataset | None
    evaluation: dict[str, Dataset]
    record: dict[str, dict[str, Any]]

    def origin(self) -> dict[str, Any]:
        """Return which sources the training pairs are from, and their mix; nothing of just one."""
        of_train = self.record["train"]
        if "sources" not in of_train:
            return {}
        prints = [of["fingerprint"] for of in of_train["sources"]]
        return {"training sources": prints, "mix": of_train["mix"]}

    def map(self, change: Callable[[Dataset, str], Dataset]) -> Prepared:
        """Return the same with every set put through `change`, which is told the set's name."""
        return dataclasses.replace(
            self,
            train=change(self.train, "train"),
            clean=self.clean and change(self.clean, "clean"),
            evaluation={name: change(pairs, name) for name, pairs in self.evaluation.items()},
        )

    def named(self) -> dict[str, Dataset]:
        """Return all sets that were given, by name."""
        clean = {"clean": self.clean} if self.clean is not None else {}
        return {"train": self.train, **clean, **self.evaluation}


def prepare(
    train: LoadedPairs,
    clean: LoadedPairs | None,
    evaluation: Mapping[str, LoadedPairs] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    context_length: int,
    on_bad_row: OnBadRow,
) -> Prepared:
    """Part and tokenize the sets.

    Raises:
        UsageError: a row is bad, a clean pair stands in the evaluation set, or a set is too small.
    """
    evaluation = evaluation or {}
    loaded = {"train": train} | ({"clean": clean} if clean else {}) | dict(evaluation)
    for other in evaluation.values():
        if clean:
            refuse_overlap(clean.pairs, other.pairs, other.source)
    sets: dict[str, Dataset] = {}
    record: dict[str, dict[str, Any]] = {}
    for name, source in loaded.items():
        pairs, where = source.pairs, {**source.where}
        if name == "train" and clean:
            pairs, _ = without_clean(pairs, clean.pairs)
            found = removed_by_source(source, pairs, clean)
            where["also_clean"] = where.get("also_clean", Counter()) + found
        done = tokenize_pairs(
            pairs, tokenizer, max_length, name=source.source, on_bad_row=on_bad_row,
            context_length=context_length,
        )  # fmt: skip
        sets[name] = done.pairs
        where |= done.where
        record[name] = {
            "source": source.source,
            "fingerprint": source.fingerprint,
            "pairs": len(done.pairs),
            **_by_source(source, done),
            **{what: where.get(what, Counter()).total() for what in REMARKS},
        }
        _say(name, record[name], where)
    if clean:
        _require_enough_clean_pairs(sets["clean"], clean.source)
    to_evaluate = {name: sets[name] for name in evaluation}
    _count_trained_on(sets["train"], to_evaluate, record)
    return Prepared(sets["train"], sets.get("clean"), to_evaluate, record)


def require_fit(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, prepared: Prepared) -> None:
    """Refuse a policy that is not sound, or that cannot read every token of a run's sets.

    Raises:
        UsageError: as in `require_sound` and `require_known_tokens`.
    """
    require_sound(policy)
    for name, pairs in prepared.named().items():
        source = prepared.record[name]["source"]
        require_known_tokens_of_pairs(policy, tokenizer, pairs, source)


def _by_source(source: LoadedPairs, done: TokenizedPairs) -> dict[str, Any]:
    """Return the rows left out and, where there are several sources, what each of them gave."""
    bad_rows = [dataclasses.asdict(bad) for bad in (*source.bad_rows, *done.bad_rows)]
    if "source" not in done.pairs.column_names:
        for bad in bad_rows:
            del bad["source"]
        return {"bad_rows": bad_rows}
    parts = {name: len(part) for name, part in by_source(done.pairs, source.source)}
    sources = [
        {
            "source": name,
            "fingerprint": fingerprint,
            "pairs": parts.get(name, 0),
            "share": parts.get(name, 0) / len(done.pairs),
        }
        for name, fingerprint in source.fingerprints.items()
    ]
    return {"bad_rows": bad_rows, "sources": sources, "mix": source.shares or None}


def _require_enough_clean_pairs(clean: Dataset, source: str) -> None:
    if len(clean) < FEWEST_CLEAN_PAIRS:
        raise UsageError(
            f"{source} has {len(clean)} usable pairs: at least {FEWEST_CLEAN_PAIRS} trusted pairs "
            "are needed, about 150 are recommended."
        )


def _count_trained_on(
    train: Dataset, evaluation: Mapping[str, Dataset], record: dict[str, dict[str, Any]]
) -> None:
    """Record how many evaluation pairs are training pairs too, and warn of them."""
    for name, count in shared_counts(train, evaluation).items():
        record[name]["also_training"] = count
        if count:
            logger.warning(
                f"warning: {count} of {len(evaluation[name])} evaluation pairs of "
                f"{record[name]['source']} are training pairs too: what is measured on them is "
                "not of new pairs"
            )


def _say(name: str, counts: dict[str, Any], where: Mapping[str, Counter[str]]) -> None:
    told = (f"{of['pairs']} pairs from {of['source']}" for of in counts.get("sources", [counts]))
    logger.info("%s: %s", name, ", ".join(told))
    for what, remark in REMARKS.items():
        for files, count in where.get(what, Counter[str]()).items():
            if count:
                logger.info("  %s: %d %s", files, count, remark)
    source = counts["source"]
    for bad in counts["bad_rows"][:LEFT_OUT_NAMED]:
        stands = place(bad.get("source", source), bad["row"])
        logger.warning("  %s left out: %s", stands, bad["reason"])
    if (more := len(counts["bad_rows"]) - LEFT_OUT_NAMED) > 0:
        logger.warning("  and %d more rows of %s left out", more, source)
