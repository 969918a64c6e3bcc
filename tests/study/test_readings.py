"""What is read off a run is what its files say, and the pictures show it."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from softpref.algorithm.labeller import MetaLearner
from softpref.study.readings import (
    examples,
    implicit_weights,
    label_curves,
    learned_map,
    noise_rate_estimate,
)
from softpref.study.targets import TARGETS
from softpref.training.teacher import save_meta_learner

BETA = 1.5
#          flipped, PPLDiff, soft label, margin, step
PAIRS = {
    "a": (False, -2.0, 0.9, 1.0, 1),
    "b": (False, 0.5, 0.2, -1.0, 2),
    "c": (True, 2.0, 0.1, -2.0, 1),
    "d": (True, -1.0, 0.8, 0.5, 2),
    "e": (False, -1.0, 0.7, 0.1, 2),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def cell(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    texts = {"prompt": "say", "rejected": "no"}
    write(
        tmp_path / "noisy.jsonl",
        [texts | {"uid": u, "chosen": f"yes {u}", "is_flipped": p[0]} for u, p in PAIRS.items()],
    )
    columns = {
        "uid": list(PAIRS)[::-1],  # another order than the data's
        **{
            name: [p[i] for p in list(PAIRS.values())[::-1]]
            for i, name in enumerate(("ppl_diff", "soft_label", "margin", "step"), start=1)
        },
    }
    pq.write_table(pa.table(columns), run / "label_history.parquet")
    write(
        run / "labels.jsonl",
        [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    )
    (run / "run.json").write_text(json.dumps({"options": {"beta": BETA}}))
    save_meta_learner(MetaLearner(4), run)
    return tmp_path


def test_labels_and_ppl_diffs_are_counted_by_truth(cell):
    reading = learned_map(cell)
    assert sum(reading["soft_labels"]["right"]) == 3
    assert sum(reading["soft_labels"]["flipped"]) == 2
    assert reading["soft_labels"]["flipped"][4] == 1  # 0.1 of 40 bins
    assert len(reading["ppl_diff"]) == len(reading["learned"]) == 100


def test_mean_labels_by_step(cell):
    reading = label_curves(cell)
    assert reading["step"] == [1, 2]
    assert reading["right"] == pytest.approx([0.9, (0.2 + 0.7) / 2])
    assert reading["flipped"] == pytest.approx([0.1, 0.8])


def test_a_step_without_flips_has_no_mean_label(cell):
    history = pq.read_table(cell / "run" / "label_history.parquet")
    steps = [9 if uid == "a" else step for uid, step in
             zip(history["uid"].to_pylist(), history["step"].to_pylist(), strict=True)]  # fmt: skip
    place = history.schema.get_field_index("step")
    pq.write_table(
        history.set_column(place, "step", pa.array(steps)), cell / "run" / "label_history.parquet"
    )
    assert label_curves(cell)["flipped"][-1] is None


def test_the_best_correction_and_the_worst_failure(cell):
    reading = examples(cell)
    assert reading["correction"]["chosen"] == "yes c"
    assert reading["correction"]["ppl_diff"] == 2.0
    assert reading["failure"]["chosen"] == "yes b"
    assert reading["failure"]["soft_label"] == pytest.approx(0.2)


def test_implicit_weights_are_how_fast_the_loss_falls_with_the_margin(cell):
    reading = implicit_weights(cell)
    for part, flipped in (("right", False), ("flipped", True)):
        pairs = sorted((p[1], p[2], p[3]) for p in PAIRS.values() if p[0] == flipped)
        for i, (ppl_diff, soft_label, at) in enumerate(pairs):
            margin = torch.tensor(at, requires_grad=True)
            loss = -F.logsigmoid(BETA * (2 * soft_label - 1) * margin)
            (slope,) = torch.autograd.grad(loss, margin)
            assert reading[part]["ppl_diff"][i] == pytest.approx(ppl_diff)
            assert reading[part]["weight"][i] == pytest.approx(-float(slope) / BETA, rel=1e-5)


def test_every_picture_shows_what_there_is(cell):
    readings = {"fig3": learned_map, "fig4": label_curves, "weights": implicit_weights}
    for name, target in TARGETS.items():
        if not target.picture:
            continue
        cells = target.cells([0, 1])
        results = {
            c.key: {"win_rate": 0.9, "clean_loss": 0.1, "held_out_loss": 0.2,
                    "win_rate_at_10": 0.6 + c.seed / 10, "win_rate_at_90": 0.9}
            | ({"reading": readings[name](cell)} if name in readings and c.method == "mspo" else {})
            for c in cells[:-1]
        }  # fmt: skip
        figure = target.picture(cells, results)
        assert all(axes.lines or axes.collections or axes.patches for axes in figure.axes), name
    curve = TARGETS["fig4"].picture(cells := TARGETS["fig4"].cells([0, 1]), {
        c.key: {"win_rate_at_10": 0.6 + c.seed / 10} for c in cells
    }).axes[0].lines[0]  # fmt: skip
    assert curve.get_xydata().tolist() == [[0, 50], [10, pytest.approx(65)]]


def test_examples_are_told_in_words(cell):
    target = TARGETS["cases"]
    (one,) = target.cells([0])
    text = target.text([one], {one.key: {"reading": examples(cell)}})
    assert "| 0 | say | yes c | no | +2.00 | 0.100 |" in text
    assert text.index("Best correction") < text.index("yes c") < text.index("Worst failure")


@pytest.mark.parametrize("rate", [None, 0.21])
def test_a_rates_expectation_is_averaged_however_sure_it_is(rate):
    """A table over seeds that took the sure ones alone would be biased."""
    noise = {"rate": rate, "low": 0.1, "high": 0.4, "expected": 0.2}
    assert noise_rate_estimate({"noise_rate": noise}) == {"noise_rate_estimate": 0.2}
    assert noise_rate_estimate({"noise_rate": None}) == {}
