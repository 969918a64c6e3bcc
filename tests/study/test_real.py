"""Studies on real pairs: files read, split by prompt and labelled; a cell; the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from softpref.errors import UsageError
from softpref.study import study
from softpref.study.choices import StudyOptions, selected_cells, validated
from softpref.study.grid import Cell
from softpref.study.real import REAL, RealPreset, interval, positive_share
from softpref.study.real_pairs import (
    Sizes,
    load_known_pairs,
    parse_labels,
    set_name,
    split,
    training_rows,
)
from softpref.study.real_tables import describe, draw_accuracy, gain_kept, seeds_to_detect
from softpref.study.study import run_study
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model
from tests.toy import toy_pairs

SIZES = Sizes(trusted=10, train=20, test=8, longest=1000)


def pairs_file(path, prompts=30, each=2):
    rows = [
        {"prompt": f"ask {i}", "chosen": f"good {i} {j}", "rejected": f"bad {i} {j}"}
        for i in range(prompts)
        for j in range(each)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def judged_file(path, **changed):
    rows = [
        {"prompt": f"ask {i}", "response_1": f"one {i}", "response_2": f"two {i}",
         "gold": 1 + i % 2,
         "judges": {"A": [1, 2], "B": [None if i % 3 else 2, 1], "C": 2}} | changed
        for i in range(30)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_parts_of_a_split_share_no_prompt_and_have_their_sizes(tmp_path):
    pairs = load_known_pairs(pairs_file(tmp_path / "a.jsonl"), as_chat=False)
    parts = split(pairs, SIZES, 3, "a")
    assert (len(parts.test), len(parts.trusted)) == (8, 10)
    prompts = [
        {row["prompt"] for row in rows}
        for rows in (parts.test, parts.trusted, [pair.row for pair in parts.pool])
    ]
    assert not prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2]
    assert split(pairs, replace(SIZES, train=5), 3, "a") == parts
    assert split(pairs, SIZES, 4, "a").test != parts.test
    assert all(row["chosen"].startswith("good") for row in parts.test + parts.trusted)


def test_a_part_is_of_many_prompts_where_prompts_have_many_pairs(tmp_path):
    pairs = load_known_pairs(pairs_file(tmp_path / "a.jsonl", each=5), as_chat=False)
    parts = split(pairs, SIZES, 3, "a")
    assert len({row["prompt"] for row in parts.test}) == 8  # of nine: three tenths of thirty
    assert len({row["prompt"] for row in parts.trusted}) == 6
    assert len({pair.prompt for pair in parts.pool[:15]}) == 15
    single = load_known_pairs(pairs_file(tmp_path / "b.jsonl", each=1), as_chat=False)
    assert len(split(single, replace(SIZES, test=12), 3, "b").pool) == 30 - 12 - 10


def test_too_few_or_too_long_pairs_are_refused(tmp_path):
    pairs = load_known_pairs(pairs_file(tmp_path / "a.jsonl"), as_chat=False)
    with pytest.raises(UsageError, match=r"a.jsonl: 60 pairs of 30 prompts .* --test_pairs"):
        split(pairs, replace(SIZES, test=50), 0, "a.jsonl")
    with pytest.raises(UsageError, match=r"0 pairs of 0 prompts have at most 10 characters"):
        split(pairs, replace(SIZES, longest=10), 0, "a.jsonl")


def test_flips_are_an_exact_share_and_nested(tmp_path):
    pairs = load_known_pairs(pairs_file(tmp_path / "a.jsonl"), as_chat=False)
    few, many = (training_rows(pairs, f"flips:{rate}", 20, 3, "a") for rate in (0.2, 0.4))
    assert [sum(row["is_flipped"] for row in rows) for rows in (few, many)] == [4, 8]
    assert all(
        after["is_flipped"] for before, after in zip(few, many, strict=True) if before["is_flipped"]
    )
    for row in many:
        assert row["chosen"].startswith("bad" if row["is_flipped"] else "good")


def test_a_judges_first_verdicts_are_labels_and_pairs_without_one_are_left_out(tmp_path):
    pairs = load_known_pairs(judged_file(tmp_path / "a.jsonl"), as_chat=True)
    assert pairs[1].row["chosen"] == [{"role": "assistant", "content": "two 1"}]
    by_a = training_rows(pairs, "judge:A", 100, 0, "a")
    assert [row["is_flipped"] for row in by_a] == [bool(i % 2) for i in range(30)]
    assert by_a[1]["chosen"][0]["content"] == "one 1"
    assert len(training_rows(pairs, "judge:B", 100, 0, "a")) == 10
    assert training_rows(pairs, "judge:C", 100, 0, "a")[0]["is_flipped"]
    with pytest.raises(UsageError, match=r"0 pairs .* verdict of D; its judges are A, B, C"):
        training_rows(pairs, "judge:D", 100, 0, "a")


@pytest.mark.parametrize("changed", [{"gold": 3}, {"gold": None}, {"response_2": None}])
def test_a_row_that_says_no_right_answer_is_named(tmp_path, changed):
    with pytest.raises(UsageError, match=r"a.jsonl, (line|row) 1"):
        load_known_pairs(judged_file(tmp_path / "a.jsonl", **changed), as_chat=False)


def test_flipped_pairs_are_not_taken_for_right_ones(tmp_path):
    toy_pairs(10, flip_every=3).to_json(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="has is_flipped or soft_label"):
        load_known_pairs(str(tmp_path / "a.jsonl"), as_chat=False)


def test_labels_have_one_spelling():
    assert parse_labels("flips:0.20") == "flips:0.2"
    assert parse_labels("judge:GPT-4") == "judge:GPT-4"
    for wrong in ("flips:1", "flips:x", "judge:", "gold", "flips:nan"):
        with pytest.raises(UsageError, match=f"--labels {wrong}: give flips:RATE"):
            parse_labels(wrong)


def test_accuracy_counts_ties_half_and_its_interval_takes_prompts_whole():
    margins = torch.tensor([1.0, 0.0, -1.0, 2.0])
    assert positive_share(margins) == 5 / 8
    many = torch.tensor([1.0, -1.0]).repeat_interleave(50)
    low, high = interval(many, [str(i) for i in range(100)])
    assert 0.38 < low < 0.42 < 0.58 < high < 0.62
    clustered = interval(many, [str(i // 10) for i in range(100)])
    assert clustered[1] - clustered[0] > 2 * (high - low)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_model(dtype=torch.float32, attention="sdpa").save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def preset(tmp_path, model):
    path = tmp_path / "toys.jsonl"
    toy_pairs(60).remove_columns("is_flipped").to_json(path)
    training = {"learning_rate": 1e-3, "num_train_epochs": 1.0, "bf16": False, "use_cpu": True}
    return RealPreset(model, {"toys": str(path)}, SIZES, training, tmp_path / "splits")


def test_a_cell_is_split_labelled_aligned_and_measured(preset, tmp_path):
    cell = Cell("mspo", 3, pairs="toys", labels="flips:0.4")
    preset.prepare(*preset.shared_key(cell))
    numbers = preset.run(cell, tmp_path / "cell")
    assert (numbers["test_pairs"], numbers["train_pairs"], numbers["noise_rate"]) == (8, 20, 0.4)
    shares = ("preference_accuracy", "start_sum_accuracy", "length_rule_accuracy", "label_auroc")
    assert all(0 <= numbers[name] <= 1 for name in shares)
    assert 0 <= numbers["preference_accuracy_low"] <= numbers["preference_accuracy_high"] <= 1
    assert min(numbers["wall_seconds"], numbers["cpu_seconds"]) > 0
    record = json.loads((tmp_path / "cell" / "run" / "run.json").read_text())
    assert (record["method"], record["steps"], record["data"]["clean"]["pairs"]) == ("mspo", 3, 10)
    assert not list((tmp_path / "cell" / "run").glob("adapter*.safetensors"))
    other = preset.run(replace(cell, method="dpo"), tmp_path / "dpo")
    assert "label_auroc" not in other
    assert other["start_sum_accuracy"] == numbers["start_sum_accuracy"]


def test_margins_are_against_the_model_as_it_was(preset, tmp_path):
    still = replace(preset, training={**preset.training, "learning_rate": 1e-12})
    cell = Cell("dpo", 3, pairs="toys", labels="flips:0")
    still.prepare(*still.shared_key(cell))
    still.run(cell, tmp_path / "cell")
    margins = json.loads((tmp_path / "cell" / "margins.json").read_text())
    assert margins == pytest.approx([0.0] * 8, abs=1e-4)


def test_an_estimate_says_runs_hours_and_a_step(preset):
    cells = [Cell(m, 3, pairs="toys", labels="flips:0") for m in ("dpo", "mspo")]
    words = preset.estimate(cells, 2)
    assert words.startswith("2 runs of ")
    assert "--jobs 2" in words
    assert "a step of 8 pairs of toys" in words


def test_an_estimate_takes_a_training_set_of_one_step(preset):
    few = replace(preset, sizes=replace(preset.sizes, train=8))
    words = few.estimate([Cell("dpo", 3, pairs="toys", labels="flips:0")], 1)
    assert words.startswith("1 runs of ")


def options(sft, tmp_path, **given):
    path = pairs_file(tmp_path / "a.jsonl")
    return StudyOptions(**{"preset": "real", "model": sft, "pairs": [path],
                           "output": str(tmp_path / "out")} | given)  # fmt: skip


def test_cells_are_of_files_labels_methods_and_seeds(model, tmp_path):
    asked = options(model, tmp_path, labels=["flips:0.20", "judge:GPT 4"], methods=["dpo"])
    target, made, _ = validated("", asked)
    cells = selected_cells(target, asked)
    name = set_name(asked.pairs[0])
    assert [cell.key for cell in cells][:2] == [
        f"dpo-{name}-flips_0.2-seed0", f"dpo-{name}-judge_GPT_4-seed0"
    ]  # fmt: skip
    assert len({cell.key for cell in cells}) == len(cells) == 6
    assert made.sizes == Sizes(140, 400, 200, 700)
    (tmp_path / "a.jsonl").write_text("{}")
    assert set_name(asked.pairs[0]) != name


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("table1", {}, "leave table1 out"),
        ("", {"pairs": None}, "--pairs is missing"),
        ("", {"model": None}, "--model is missing"),
        ("", {"output": ""}, "--output is missing"),
        ("", {"pairs": ["no.jsonl"]}, r"--pairs no.jsonl: No such file"),
        ("", {"labels": ["flip"]}, "--labels flip: give flips:RATE"),
        ("", {"methods": ["ppo"]}, "--methods ppo"),
        ("", {"noise": [0.2]}, "--noise is not read by --preset real: give --labels instead"),
        ("", {"recipe": "faithful"}, "neither --signal nor --recipe"),
        ("", {"train": "a.jsonl"}, "--train is not read by --preset real"),
        ("", {"test_pairs": 0}, "--test_pairs 0: must be at least 1"),
        ("", {"epochs": math.nan}, "--epochs nan: must be above 0"),
        ("table1", {"preset": "world", "model": None, "pairs": None, "bf16": True},
         "--bf16 is not read by --preset world"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_nothing_is_written(model, tmp_path, name, given, message):
    with pytest.raises(UsageError, match=message):
        run_study(name, options(model, tmp_path, **given))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(study, "_timed", lambda preset, cells, jobs: f"{len(cells)} of {jobs}.")
    caplog.set_level("INFO")
    run_study("", options(model, tmp_path, dry_run=True, jobs=2, seeds=[0], output=""))
    assert "21 of 2. Nothing was run." in caplog.text
    assert not (tmp_path / "out").exists()


def made_up(accuracies):
    """Numbers of cells by method, a seed each."""
    return {
        Cell(method, seed, pairs="some.set@1", labels="flips:0.4").key: {
            "preference_accuracy": accuracy, "preference_accuracy_low": accuracy - 0.07,
            "preference_accuracy_high": accuracy + 0.07, "test_pairs": 200, "test_prompts": 90,
            "train_pairs": 400, "noise_rate": 0.4, "cpu_seconds": 120.0,
            "length_rule_accuracy": 0.77, "start_sum_accuracy": 0.4, "start_mean_accuracy": 0.5,
        }
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    }  # fmt: skip


def test_the_page_compares_with_dpo_by_seed_and_says_what_would_tell():
    accuracies = {"dpo": (0.52, 0.54), "mspo": (0.55, 0.53), "oracle": (0.62, 0.64)}
    cells = REAL.cells([0, 1], pairs=["some.set@1"], labels=["flips:0.4"])
    page = describe(cells, made_up(accuracies))
    assert "## some.set, flips:0.4" in page
    assert "| oracle | 2 | 63.0 (50.3 to 75.7) | 100% | +10.0 (+10.0 to +10.0) | separated |" in (
        page
    )
    assert "| mspo | 2 | 54.0 (41.3 to 66.7) | 31% | +1.0 (-24.4 to +26.4) | 63 seeds, 12,600" in (
        page
    )
    one = describe(cells[:7], made_up({"dpo": (0.52,), "mspo": (0.55,)}))
    assert "| mspo | 1 | 55.0 (48.0 to 62.0) |  | +3.0 (one seed) |" in one
    assert len(draw_accuracy(cells, made_up(accuracies)).axes) == 1


def test_power_and_gain_are_as_written():
    assert seeds_to_detect(0.01, 0.0283) == 63  # ((1.95996 + 0.84162) * 2.83)² = 62.9
    assert seeds_to_detect(0.0, 0.1) is None
    assert gain_kept({0: 0.6, 1: 0.9}, {0: 0.7}) == "50%"
    assert gain_kept({0: 0.6}, {0: 0.5}) == "none to keep"
