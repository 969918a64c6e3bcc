"""Every warning is given where it is due, and not where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from softpref.algorithm.noise_rate import NoiseRate
from softpref.auditing.beliefs import Beliefs
from softpref.auditing.scores import Scored
from softpref.auditing.warnings import warnings_about
from softpref.data.splits import ASSUMED_CORRECT
from tests.toy import toy_pairs

GOOD = Scored(toy_pairs(10), toy_pairs(150), torch.empty(10), torch.empty(150), 0, 0)
SURE = NoiseRate(0.2, 0.15, 0.25, 0.2)


REVIEWED = "given as a file"


def beliefs(doubted=0, is_rising=True):
    none = torch.empty(0)
    return Beliefs(none, none, is_rising, none, 0.0, [], list(range(doubted)))


def test_nothing_to_warn_of():
    assert warnings_about(GOOD, SURE, beliefs(15), 0.5, REVIEWED) == []


@pytest.mark.parametrize(
    ("scored", "noise", "longer", "doubted", "words"),
    [
        (GOOD, NoiseRate(0.2, 0.0, 0.5, 0.25), 0.5, 0, "cannot tell right from wrong"),
        (replace(GOOD, clean=toy_pairs(99)), SURE, 0.5, 0, "99 trusted pairs are few"),
        (GOOD, SURE, 0.5, 16, "contradicts 16 of the 150"),
        (replace(GOOD, sft_targets=3), SURE, 0.5, 0, "responses of 3 of the 10 pairs"),
        (GOOD, SURE, 0.77, 0, "the longer response is the one labelled better in 77%"),
        (GOOD, SURE, 0.2, 0, "the shorter response is the one labelled better in 80%"),
        (replace(GOOD, contradicting=2), SURE, 0.5, 0, "2 pairs are labelled both ways"),
    ],
)
def test_each_is_given(scored, noise, longer, doubted, words):
    (warning,) = warnings_about(scored, noise, beliefs(doubted), longer, REVIEWED)
    assert words in warning


def test_a_model_that_is_fluent_in_what_it_gets_wrong():
    (warning,) = warnings_about(GOOD, SURE, beliefs(is_rising=False), 0.5, REVIEWED)
    assert "fluent in what it gets wrong" in warning


def test_trusted_pairs_that_nobody_reviewed():
    (warning,) = warnings_about(GOOD, SURE, beliefs(), 0.5, ASSUMED_CORRECT)
    assert "nobody reviewed them" in warning
