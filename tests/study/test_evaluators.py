"""Evaluators: from a run's directory to named numbers."""

from __future__ import annotations

import json

import pytest

from softpref.data.noise import inject
from softpref.data.sources import load_pairs
from softpref.study.evaluators import HeldOutPairs, LabelQuality


def pairs_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"prompt": f"p{i}", "chosen": "long answer", "rejected": "short"} for i in range(40)]


def test_held_out_accuracy_stands_beside_the_length_rule(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "xxx", "rejected": "y"},
        {"prompt": "b", "chosen": "x", "rejected": "yyy"},
        {"prompt": "c", "chosen": "x", "rejected": "y"},
        {"prompt": "d", "chosen": "xx", "rejected": "y"},
    ]
    (tmp_path / "run.json").write_text('{"evaluation": {"eval_rewards/accuracies": 0.75}}')
    evaluate = HeldOutPairs(pairs_file(tmp_path / "eval.jsonl", rows))
    assert evaluate(tmp_path) == {"preference_accuracy": 0.75, "length_rule_accuracy": 2.5 / 4}


def test_the_length_of_messages_is_that_of_what_they_say(tmp_path):
    def says(*contents):
        return [{"role": "assistant", "content": content} for content in contents]

    (tmp_path / "run.json").write_text('{"evaluation": {"eval_rewards/accuracies": 0.75}}')
    prompt = [{"role": "user", "content": "?"}]
    rows = [{"prompt": prompt, "chosen": says("12345"), "rejected": says("1", "2")}]
    evaluate = HeldOutPairs(pairs_file(tmp_path / "eval.jsonl", rows))
    assert evaluate(tmp_path)["length_rule_accuracy"] == 1


def labelled_run(tmp_path, rate, row):
    noisy = str(tmp_path / "noisy.jsonl")
    inject(pairs_file(tmp_path / "train.jsonl", ROWS), noisy, rate, 1)
    pairs = load_pairs(noisy).pairs
    labels = [{"uid": uid, **row(flipped)}
              for uid, flipped in zip(pairs["uid"], pairs["is_flipped"], strict=True)]  # fmt: skip
    pairs_file(tmp_path / "labels.jsonl", reversed(labels))
    return LabelQuality(noisy)


def test_label_quality_goes_by_uid_and_knows_which_way_is_good(tmp_path):
    evaluate = labelled_run(tmp_path, 0.4, lambda flipped: {
        "p_correct": 0.1 if flipped else 0.8, "soft_label": 0.2 if flipped else 0.9,
    })  # fmt: skip
    numbers = evaluate(tmp_path)
    assert numbers["label_auroc"] == 1
    assert numbers["label_mean_right"] == pytest.approx(0.9)
    assert numbers["label_mean_flipped"] == pytest.approx(0.2)


def test_a_uid_that_looks_like_a_date_is_text(tmp_path):
    rows = [
        {
            "prompt": f"p{n}",
            "chosen": "a",
            "rejected": "b",
            "uid": f"2024-01-{n:02}",
            "is_flipped": n > 9,
        }
        for n in range(1, 20)
    ]
    noisy = pairs_file(tmp_path / "noisy.jsonl", rows)
    labels = [
        {"uid": r["uid"], "p_correct": 1.0 - r["is_flipped"], "soft_label": None} for r in rows
    ]
    pairs_file(tmp_path / "labels.jsonl", labels)
    assert LabelQuality(noisy)(tmp_path) == {"label_auroc": 1.0}


def test_numbers_that_cannot_be_had_are_left_out(tmp_path):
    evaluate = labelled_run(tmp_path, 0.0, lambda _: {"p_correct": 0.8, "soft_label": 0.9})
    assert set(evaluate(tmp_path)) == {"label_mean_right"}
    evaluate = labelled_run_again(tmp_path)
    assert evaluate(tmp_path) == {}


def labelled_run_again(tmp_path):
    (tmp_path / "noisy.jsonl").unlink()
    return labelled_run(tmp_path, 0.4, lambda _: {"p_correct": None, "soft_label": None})
