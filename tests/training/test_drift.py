"""What a user is told when processes come apart; `tests/distributed` lets them."""

from __future__ import annotations

import pytest

from softpref.algorithm.ranks import DriftError, Ranks
from softpref.errors import UsageError
from softpref.training.drift import STEPS_BETWEEN, require_alike
from tests.tiny import tiny_model


def test_drift_is_looked_for_now_and_then_and_said_in_words(monkeypatch):
    looked = []

    def differs(self, what, tensors):
        looked.append(what)
        raise DriftError(f"{what} differs between processes")

    monkeypatch.setattr(Ranks, "require_alike", differs)
    policy = tiny_model()
    require_alike(Ranks(0, 2), STEPS_BETWEEN - 1, policy, None)
    require_alike(Ranks(), STEPS_BETWEEN, policy, None)
    assert not looked
    with pytest.raises(UsageError, match="step 51: the step differs.*device that computes wrongly"):
        require_alike(Ranks(0, 2), STEPS_BETWEEN, policy, None)
