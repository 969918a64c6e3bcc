"""Every warning is given where it is due, and not where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from softpref.auditing.beliefs import PairBeliefs
from softpref.auditing.scores import ScoredSets
from softpref.auditing.warnings import warnings_about
from softpref.data.splits import ASSUMED_CORRECT
from tests.toy import toy_pairs

GOOD = ScoredSets(
    toy_pairs(10), toy_pairs(150), torch.empty(10), {}, 0, "data.jsonl", "clean.jsonl"
)
REVIEWED = "given as a file"


def beliefs(doubted=0, speaks=True, is_misled=False):
    none = torch.empty(0)
    return PairBeliefs(none, none, speaks, is_misled, 0.8, 0.0, [], list(range(doubted)))


def test_nothing_to_warn_of():
    assert warnings_about(GOOD, beliefs(15), 0.5, REVIEWED) == []


@pytest.mark.parametrize(
    ("scored", "found", "longer", "words"),
    [
        (GOOD, beliefs(speaks=False), 0.5, "cannot distinguish right labels"),
        (GOOD, beliefs(is_misled=True), 0.5, "are wrong more often than its weaker ones"),
        (
            replace(GOOD, clean=toy_pairs(99)),
            beliefs(),
            0.5,
            "99 trusted pairs, clean.jsonl, are few",
        ),
        (GOOD, beliefs(16), 0.5, "contradicts 16 of the 150 trusted pairs, clean.jsonl:"),
        (
            replace(GOOD, sft_targets=3),
            beliefs(),
            0.5,
            "responses of 3 of the 10 pairs of data.jsonl and",
        ),
        (
            GOOD,
            beliefs(),
            0.77,
            "the longer response is the one labelled better in 77% of the pairs of data.jsonl:",
        ),
        (GOOD, beliefs(), 0.2, "the shorter response is the one labelled better in 80%"),
        (
            replace(GOOD, contradicting={"a.jsonl and b.jsonl": 2, "b.jsonl": 1}),
            beliefs(),
            0.5,
            "so one of the two labels is wrong: 2 in a.jsonl and b.jsonl, 1 in b.jsonl",
        ),
    ],
)
def test_each_is_given(scored, found, longer, words):
    (warning,) = warnings_about(scored, found, longer, REVIEWED)
    assert words in warning


def test_where_evidence_is_uninformative_nothing_is_said_about_its_direction():
    (warning,) = warnings_about(GOOD, beliefs(speaks=False, is_misled=True), 0.5, REVIEWED)
    assert "cannot distinguish" in warning


def test_trusted_pairs_that_nobody_reviewed():
    (warning,) = warnings_about(GOOD, beliefs(), 0.5, ASSUMED_CORRECT)
    assert "were not reviewed" in warning
