"""Which pairs are hard: those that a fixed surrogate model hardly tells apart (paper, 4.3).

Shapes: n pairs of a file, in its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softpref.algorithm.rows import PairBatch
from softpref.columns import STANDARD, Columns
from softpref.data.bad_rows import place
from softpref.data.noise import Injected, inject, refuse_bad_rows, require_no_margin
from softpref.data.sources import load_pairs
from softpref.data.tokens import tokenize_pairs
from softpref.errors import UsageError
from softpref.models.layout import choose_layout, longest_pairs
from softpref.models.loading import context_length, load_policy, load_tokenizer, on_accelerator
from softpref.models.scoring import Scorer
from softpref.models.soundness import require_known_tokens_of_pairs, require_sound

HARD_RATE, EASY_RATE = 0.4, 0.1  # the paper's
MAX_LENGTH = 1024  # tokens, as in training
_BATCH_SIZE = 8  # pairs, as in evaluation


@dataclass(frozen=True)
class InjectedByDifficulty:
    """What was done to all pairs, to the hard ones and to the easy ones.

    Attributes:
        every: all pairs; their rate is the mean of the two.
        hard: the pairs whose log-ratio has a size below `median`.
        easy: the others.
        median: of the log-ratios' sizes, nats.
    """

    every: Injected
    hard: Injected
    easy: Injected
    median: float


def inject_by_difficulty(
    source: str,
    output: str,
    surrogate: str,
    seed: int,
    *,
    hard_rate: float = HARD_RATE,
    easy_rate: float = EASY_RATE,
    max_length: int = MAX_LENGTH,
    trust_remote_code: bool = False,
    columns: Columns = STANDARD,
) -> InjectedByDifficulty:
    """Flip labels as `inject` does, hard pairs at one rate and easy ones at another (Table 4).

    Args:
        source: what `load_pairs` reads.
        output: a new file.
        surrogate: says which pairs are hard: a directory or hub id, full or adapter.
        seed: seed of the draws.
        hard_rate: probability of a flip where |log-ratio| is below the median, in [0, 1).
        easy_rate: probability of a flip elsewhere, in [0, 1).
        max_length: most tokens of prompt and response.
        trust_remote_code: whether to run code that comes with the model.
        columns: what the source's columns are called.

    Raises:
        UsageError: as in `log_ratio_sizes` and `inject`.
    """
    require_no_margin(source)  # before the surrogate reads
    sizes = log_ratio_sizes(
        source, surrogate, max_length, trust_remote_code=trust_remote_code, columns=columns
    )
    is_hard = hard_pairs(sizes)
    done = inject(source, output, flip_rates(is_hard, hard_rate, easy_rate), seed, columns)
    return InjectedByDifficulty(
        done,
        done.among(is_hard.tolist(), hard_rate),
        done.among((~is_hard).tolist(), easy_rate),
        float(sizes.quantile(0.5)),
    )


MUST_READ_ALL = (
    "The surrogate must read every pair: remove it, raise --max_length, or choose a --model that "
    "reads more tokens"
)


def log_ratio_sizes(
    source: str, surrogate: str, max_length: int, *, trust_remote_code: bool, columns: Columns
) -> Tensor:
    """Return how far apart the surrogate finds each pair's responses, whichever is labelled chosen.

        |log π(y1|x) − log π(y2|x)|, sums over response tokens

    of "Difficulty-Dependent Noise" (4.3, Table 4). A pair labelled the other way has the same size
    to the last bit.

    The arguments are those of `inject_by_difficulty`; every row must be a pair that fits
    `max_length`, and responses are cut at their end.

    Returns:
        Shape (n,), nats, float64, on the CPU.

    Raises:
        UsageError: a row cannot be used, there is no such model, or it finds a response so unlikely
            that its log-probability is not finite.
    """
    loaded = load_pairs(source, on_bad_row="skip", columns=columns)
    refuse_bad_rows(loaded.bad_rows, "Fix or remove it")
    tokenizer = load_tokenizer(surrogate, trust_remote_code=trust_remote_code)
    policy = load_policy(surrogate, trust_remote_code=trust_remote_code)
    limits = {"max_length": max_length, "context_length": context_length(policy)}
    tokenized = tokenize_pairs(loaded.pairs, tokenizer, name=source, on_bad_row="skip", **limits)
    refuse_bad_rows(tokenized.bad_rows, MUST_READ_ALL)
    require_sound(on_accelerator(policy))
    require_known_tokens_of_pairs(policy, tokenizer, tokenized.pairs, source)
    probe = [_in_fixed_order(pair) for pair in longest_pairs(tokenized.pairs)]
    collate = choose_layout("auto", policy, probe).apply(policy)

    def unlabelled(pairs: Sequence[Mapping[str, Any]]) -> PairBatch:
        """Make a batch that does not depend on which response is labelled chosen."""
        return collate([_in_fixed_order(pair) for pair in pairs])

    scorer = Scorer(policy, unlabelled, batch_size=_BATCH_SIZE)
    scored = scorer.measure(tokenized.pairs, "difficulty")
    sizes = (scored.chosen_logp.double() - scored.rejected_logp.double()).abs()
    _require_finite(sizes, loaded.pairs["row"][:], source, surrogate)
    return sizes


def hard_pairs(sizes: Tensor) -> Tensor:
    """Return which pairs are hard: those of a size (n,) below the median; (n,) bool.

    The median of an even number is the middle of the two in the middle. Pairs of one size are all
    hard or all easy, so where many share the median fewer than half are hard.
    """
    return sizes < sizes.quantile(0.5)


def flip_rates(is_hard: Tensor, hard_rate: float, easy_rate: float) -> list[float]:
    """Return each pair's probability of a flip: `hard_rate` where hard (n,), else `easy_rate`."""
    return [hard_rate if hard else easy_rate for hard in is_hard.tolist()]


def _in_fixed_order(pair: Mapping[str, Any]) -> dict[str, Any]:
    first, second = sorted([pair["chosen_ids"], pair["rejected_ids"]])
    return {**pair, "chosen_ids": first, "rejected_ids": second}


def _require_finite(sizes: Tensor, rows: Sequence[int], source: str, surrogate: str) -> None:
    bad = (~sizes.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise UsageError(
            f"--model {surrogate}: log-probabilities of {len(bad)} pairs are not finite, first in "
            f"{place(source, rows[bad[0]])}: remove them, or choose another model."
        )
