"""Judges that score in several processes: the first asks, and all of them score."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from softpref.algorithm.ranks import Ranks
from softpref.errors import UsageError
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Answer, Judge, Question
from softpref.judging.scored import ScoringJudge

_END = json.dumps(None)
_SCORING = ("reward_model", "implicit_reward")


def refuse_idle_ranks(judges: Sequence[JudgeOptions], ranks: Ranks) -> None:
    """Refuse several processes where none of the judges scores responses by a model.

    Raises:
        UsageError: the message says how to start the command.
    """
    kinds = [judge.judge for judge in judges]
    if ranks.count > 1 and not {*kinds} & {*_SCORING}:
        raise UsageError(
            f"--judge {kinds[0]}: one process asks it, and {ranks.count} were started; start the "
            f"command without torchrun, or choose {' or '.join(_SCORING)}."
        )


class _Handed(ScoringJudge):
    """A judge whose batches are handed to the other processes before they are scored."""

    def __init__(self, judge: ScoringJudge, number: int, ranks: Ranks) -> None:
        self._judge, self._number, self._ranks = judge, number, ranks
        self.batch_size = judge.batch_size
        self.identity = judge.identity

    def answers(self, batch: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions whose texts differ."""
        self._ranks.from_first(json.dumps([self._number, [asdict(each) for each in batch]]))
        return self._judge.answers(batch)

    def finish(self) -> None:
        """Keep what the answers so far have taught, if anything."""
        self._judge.finish()


@contextmanager
def asking(judges: Sequence[Judge], ranks: Ranks) -> Iterator[list[Judge]]:
    """Yield judges for the first process to ask, while the others `follow`.

    After an error the others are not released: they end with this process.
    """
    if ranks.count == 1:
        yield list(judges)
        return
    yield [
        _Handed(judge, number, ranks) if isinstance(judge, ScoringJudge) else judge
        for number, judge in enumerate(judges)
    ]
    ranks.from_first(_END)


def follow(judges: Sequence[Judge], ranks: Ranks) -> None:
    """Score what the first process asks the same judges, until it has asked all."""
    while handed := json.loads(ranks.from_first()):
        number, batch = handed
        judge = judges[number]
        assert isinstance(judge, ScoringJudge)
        judge.answers([Question(**each) for each in batch])
