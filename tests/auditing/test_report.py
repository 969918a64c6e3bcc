"""What the report says above its pairs, without a browser; tests/browser reads the page itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from datasets import Dataset

from softpref.auditing.charts import bars
from softpref.auditing.report import charts, headline, page_data
from tests.auditing.said import Said

ROWS = Dataset.from_dict(
    {
        "uid": ["a", "b"],
        "p_correct": [0.9, 0.2],
        "rank": [2, 1],
        "evidence": [{"fluency": 0.5, "content": 1.0}, {"fluency": -0.1, "content": -3.0}],
        "flag": ["fine", "suspect"],
        "why": ["one", "two"],
    }
)
PAIRS = Dataset.from_dict({"prompt": ["p", "q"], "chosen": ["c", "d"], "rejected": ["r", "s"]})


def test_the_headline_says_how_many_how_sure_and_what_to_do():
    said = headline(Said())
    assert said.startswith("About 20% of the 1,200 labels are wrong, between 15% and 25%")
    assert "80 are suspect" in said
    assert said.endswith("AUROC 0.812 on trusted pairs in cross-validation, 0.700 by length alone.")


def test_a_rate_that_is_unknown_is_not_told_though_evidence_speaks():
    said = headline(replace(Said(), noise_rate=None, noise_rate_low=0.0, noise_rate_high=0.5))
    assert said.startswith("How many of the 1,200 labels are wrong is unknown. 80 are suspect")
    assert "20%" not in said


@pytest.mark.parametrize(
    ("low", "words"),
    [(0.0, "At most 38% of the 1,200"), (0.12, "Between 12% and 38% of the 1,200")],
)
def test_of_a_wide_interval_only_the_ends_are_told(low, words):
    said = headline(replace(Said(), noise_rate=None, noise_rate_low=low, noise_rate_high=0.38))
    assert said.startswith(f"{words} labels are wrong, with 95% confidence. 80 are suspect")
    assert "About" not in said


def test_the_headline_claims_nothing_where_evidence_does_not_speak():
    said = headline(replace(Said(), evidence_speaks=False, suspect=0))
    assert said.startswith(
        "Unknown for these 1,200 labels: nothing in the data distinguishes right labels"
    )
    assert "(AUROC 0.812 on trusted pairs in cross-validation, 0.700 by length alone)" in said
    assert charts(ROWS, replace(Said(), evidence_speaks=False)) == []
    assert "%" not in said
    assert "suspect" not in said


def test_pairs_come_with_their_evidence_the_most_suspect_first():
    entries = page_data(ROWS, PAIRS, "fingerprint", 0)["pairs"]
    assert [entry[:4] for entry in entries] == [
        ["b", 0.2, -3.1, "suspect"],
        ["a", 0.9, 1.5, "fine"],
    ]


def test_the_picture_of_what_evidence_comes_from():
    drawn = charts(ROWS, Said())[1]
    read_out = "Evidence by kind, nats: fluency 0.30, what the responses say 2.00"
    assert f'role="img" aria-label="{read_out}"' in drawn
    assert "fluency 0.30</text>" in drawn


@pytest.mark.parametrize(
    ("values", "widths"), [((1.0, 4.0), ("75.0", "300.0")), ((0.0,), ("0.0",))]
)
def test_bars_are_as_long_as_their_numbers(values, widths):
    drawn = bars({f"<{i}>": value for i, value in enumerate(values)}, "title", "caption")
    assert all(f'width="{width}"' in drawn for width in widths)
    assert "&lt;0&gt;" in drawn
    assert "<0>" not in drawn
