"""What the report says above its pairs, without a browser; tests/browser reads the page itself."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from datasets import Dataset

from softpref.auditing.charts import bars, histogram, reliability_curve
from softpref.auditing.explanations import NO_EVIDENCE
from softpref.auditing.report import charts, headline, page_data
from softpref.data.splits import ASSUMED_CORRECT
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


def test_the_headline_is_conditional_on_trusted_pairs_that_nobody_reviewed():
    said = headline(replace(Said(), clean_provenance=ASSUMED_CORRECT))
    assert said.startswith("If the trusted pairs, which were not reviewed, are right: About 20% of")


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


def ticks(drawn):
    found = re.findall(r'<text x="([0-9]+)" y="164" [^>]*>([^<]*)<', drawn)
    return {label: int(x) for x, label in found}


def bars_of(drawn):
    found = re.findall(r'<rect class="bar" x="([0-9.]+)" width="([0-9.]+)"', drawn)
    return [(float(x), float(x) + float(width)) for x, width in found]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([-1.0, 2.0], ["-1.05", "2.02", "0"]),
        ([1.0, 2.0], ["2", "0"]),  # the label of the end would touch the one at the turn
        ([0.0, 0.0], ["-0.5", "0.5", "0"]),
        ([-3.0, -1e-9, 0.0, 0.0, 3.0], ["-2.98", "2.98", "0"]),
    ],
)
def test_evidence_has_a_mark_at_0_where_its_caption_turns(values, labels):
    drawn = histogram(values, 0, "title", "caption")
    assert [*ticks(drawn)] == labels
    turn = ticks(drawn)["0"]
    (line,) = re.findall(r'<line class="ideal" x1="([0-9.]+)"', drawn)
    assert float(line) == pytest.approx(turn, abs=0.5)
    assert all(right <= turn + 0.5 or left >= turn - 0.5 for left, right in bars_of(drawn))
    below = sum(value < 0 for value in values)
    assert f'aria-label="title: {below} of {len(values)} pairs are below 0"' in drawn


@pytest.mark.parametrize("values", [[0.7] * 9, [0.0, 1.0], [0.5, 0.49, 0.999]])
def test_the_axis_of_probabilities_is_from_0_to_1(values):
    drawn = histogram(values, 0.5, "title", "caption", (0, 1))
    assert ticks(drawn) == {"0": 40, "1": 300, "0.5": 170}
    assert all(left >= 40 and right <= 300 for left, right in bars_of(drawn))


def test_points_on_the_edge_of_the_plot_are_drawn_whole_and_read_out():
    bins = [{"stated": 0.0, "right": 0.0, "pairs": 3}, {"stated": 1.0, "right": 1.0, "pairs": 3}]
    drawn = reliability_curve(bins, "title", "caption")
    assert re.findall(r'cx="([0-9.]+)" cy="([0-9.]+)"', drawn) == [
        ("40.0", "146.0"),
        ("300.0", "10.0"),
    ]
    assert drawn.index("circle") > drawn.rindex('class="axis"')  # above the axes
    assert 'aria-label="title: stated 0% right 0%, stated 100% right 100%"' in drawn


def test_the_order_of_a_sampled_pair_is_drawn_by_uid_and_data():
    count = 60
    rows = ROWS.select([0] * count).remove_columns(["uid", "rank"])
    rows = rows.add_column("uid", [f"u{i}" for i in range(count)])
    rows = rows.add_column("rank", [*range(1, count + 1)])
    pairs = PAIRS.select([0] * count)

    def drawn(fingerprint, seed):
        originals = page_data(rows, pairs, fingerprint, seed)["originals"]
        return {uid: one["worse_first"] for uid, one in originals.items()}

    assert 15 < sum(drawn("a", 0).values()) < 45
    assert drawn("a", 0) == drawn("a", 1) != drawn("b", 0)


@pytest.mark.parametrize(
    ("why", "shown"), [("", ""), ("; labelled the other way", "labelled the other way")]
)
def test_no_evidence_is_no_reason(why, shown):
    rows = ROWS.remove_columns("why").add_column("why", [NO_EVIDENCE + why] * 2)
    assert {entry[8] for entry in page_data(rows, PAIRS, "f", 0)["pairs"]} == {shown}
    rows = rows.add_column("source", ["a", "a"])
    shown = f"{shown}; from a" if shown else "from a"
    assert {entry[8] for entry in page_data(rows, PAIRS, "f", 0)["pairs"]} == {shown}
