"""What a labeller may see of a pair, by name.

Shapes: B pairs; a signal is one number per pair, (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from torch import Tensor

from softpref.algorithm.likelihood import Measured


@dataclass(frozen=True)
class Signal:
    """One number that is known of a pair when its label is made.

    Attributes:
        name: what options and saved meta-learners call it.
        of: reads it, (B,), from what was measured.
        column: the data set's column with its value under the starting policy; None where that
            is 0 for every pair.
        parity: what swapping the two responses does to it: −1 changes its sign, +1 leaves it.
    """

    name: str
    of: Callable[[Measured], Tensor]
    column: str | None
    parity: Literal[-1, 1]


PPL_DIFF = Signal("ppl_diff", attrgetter("ppl_diff"), "starting_ppl_diff", parity=-1)
"""PPLDiff under the current policy (Eq. 5), nats per token."""
STARTING_PPL_DIFF = Signal(
    "starting_ppl_diff", attrgetter("starting_ppl_diff"), "starting_ppl_diff", parity=-1
)
"""PPLDiff under the policy training started from (section 4.3), nats per token."""
MARGIN = Signal("margin", attrgetter("margin"), None, parity=-1)
"""h of Eq. 1, nats: 0 before the first step, where policy and reference are the same."""
EVIDENCE = Signal("evidence", attrgetter("evidence"), "evidence", parity=-1)
"""g of evidence.py, fitted before training, nats."""

SIGNALS = {signal.name: signal for signal in (PPL_DIFF, MARGIN, STARTING_PPL_DIFF, EVIDENCE)}
