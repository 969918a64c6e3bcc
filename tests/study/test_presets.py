"""Where studies run: a cell's files are what the cell says, and its numbers those of a real run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.study import presets
from softpref.study.grid import Cell
from softpref.study.presets import FilesPreset, _config, for_recipe
from softpref.world.prepare import alignment, prepare_world
from tests.study.conftest import SMALL


def flipped_share(path):
    flips = load_pairs(str(path)).pairs["is_flipped"]
    return sum(flips) / len(flips)


def test_a_cell_of_the_world_is_flipped_aligned_and_measured(in_world, tmp_path):
    numbers = in_world.run(Cell("mspo", 3), tmp_path / "cell")
    assert 0.25 < flipped_share(tmp_path / "cell" / "noisy.jsonl") < 0.55
    assert flipped_share(tmp_path / "cell" / "clean.jsonl") == 0
    assert len(load_pairs(str(tmp_path / "cell" / "clean.jsonl")).pairs) == 12
    rates = {"win_rate", "preference_accuracy", "length_rule_accuracy", "label_auroc", "score"}
    assert rates <= numbers.keys()
    assert all(0 <= numbers[name] <= 1 for name in rates)
    record = json.loads((tmp_path / "cell" / "run" / "run.json").read_text())
    assert (record["method"], record["options"]["seed"], record["steps"]) == ("mspo", 3, 2)
    assert not (tmp_path / "cell" / "run" / "model.safetensors").exists()
    assert (tmp_path / "cell" / "run" / "meta_learner.safetensors").exists()


def test_clean_sets_are_of_the_asked_size_begin_alike_and_may_be_flipped(in_world, tmp_path):
    in_world.run(Cell("mspo", 3, clean_pairs=16, clean_noise_rate=0.5), tmp_path / "many")
    in_world.run(Cell("dpo", 3), tmp_path / "usual")
    many, usual = (
        load_pairs(str(tmp_path / name / "clean.jsonl")).pairs for name in ("many", "usual")
    )
    assert (len(many), len(usual)) == (16, 12)
    assert many["prompt"][:12] == usual["prompt"][:]
    assert 0 < flipped_share(tmp_path / "many" / "clean.jsonl") < 1


def test_a_method_that_does_not_look_at_labels_has_no_auroc(in_world, tmp_path):
    assert "label_auroc" not in in_world.run(Cell("dpo", 3), tmp_path / "dpo")
    assert "label_auroc" in in_world.run(Cell("perpcorrect", 3), tmp_path / "perpcorrect")


def test_difficult_pairs_are_flipped_more_often(in_world, tmp_path, monkeypatch):
    asked = {}

    def spy(*args, hard_rate, easy_rate):
        asked.update(surrogate=args[2], rates=(hard_rate, easy_rate))
        return by_difficulty(*args, hard_rate=hard_rate, easy_rate=easy_rate)

    by_difficulty = presets.inject_by_difficulty
    monkeypatch.setattr(presets, "inject_by_difficulty", spy)
    in_world.run(Cell("dpo", 3, 0.25, "difficulty"), tmp_path / "cell")
    assert asked["rates"] == pytest.approx((0.4, 0.1))
    assert asked["surrogate"].endswith("sft")


def test_a_rival_is_met_and_win_rates_are_taken_on_the_way(in_world, tmp_path):
    cell = Cell("mspo", 3, rival="perpcorrect", measure_every=1)
    numbers = in_world.run(cell, tmp_path / "cell")
    assert {"rival_win_rate", "rival_win_rate_low", "win_rate_at_1", "win_rate_at_2"} <= {*numbers}
    assert numbers["win_rate_at_2"] == numbers["win_rate"]
    assert numbers["win_rate_at_1"] != numbers["win_rate"]
    assert not list((tmp_path / "cell" / "run").glob("checkpoint-*"))
    assert not list((tmp_path / "cell").glob("run-of-*"))


def test_a_policy_meets_itself_in_one_of_two_cases(in_world, tmp_path):
    numbers = in_world.run(Cell("dpo", 3, 0.0, rival="dpo"), tmp_path / "cell")
    assert numbers["rival_win_rate_low"] < 0.5 < numbers["rival_win_rate_high"]


@pytest.mark.parametrize("sft_data", ["clean_chosen", "noisy_chosen"])
def test_a_second_pass_of_sft_sees_what_the_cell_says(in_world, tmp_path, monkeypatch, sft_data):
    seen = {}

    def spy(files, options):
        seen.update(files=files, options=options)
        second_sft(files, options)

    second_sft = presets._second_sft
    monkeypatch.setattr(presets, "_second_sft", spy)
    numbers = in_world.run(Cell("mspo", 3, sft_data=sft_data), tmp_path / "cell")
    expected = "noisy.jsonl" if sft_data == "noisy_chosen" else "train.jsonl"
    assert seen["files"].train.endswith(expected)
    record = json.loads((tmp_path / "cell" / "run" / "run.json").read_text())
    assert record["files"]["model"].endswith("cell/sft")
    plain = in_world.run(Cell("mspo", 3), tmp_path / "plain")
    assert numbers["sft_score"] != plain["sft_score"]  # compared with the model it started from


def test_the_small_model_is_another_world(in_world, tmp_path):
    in_world.run(Cell("dpo", 3, model_size="small"), tmp_path / "small")
    sft = in_world.home / "informative-small-seed3" / "sft"
    assert json.loads((sft / "config.json").read_text())["hidden_size"] == 64


def test_losses_of_clean_and_held_out_pairs(in_world, tmp_path):
    numbers = in_world.run(Cell("dpo", 3, 0.0), tmp_path / "cell")
    record = json.loads((tmp_path / "cell" / "run" / "run.json").read_text())
    assert numbers["held_out_loss"] == record["evaluation"]["eval_loss"]
    assert 0 < numbers["clean_loss"] < 1.5
    assert numbers["clean_loss"] != numbers["held_out_loss"]


def test_files_of_the_users_own(in_world, tmp_path):
    world = prepare_world(SMALL, 3, tmp_path / "own")
    files = FilesPreset(world.sft, *(world.pairs(name) for name in ("train", "clean", "eval")))
    numbers = files.run(Cell("mspo", 0), tmp_path / "cell")
    assert {"preference_accuracy", "length_rule_accuracy", "label_auroc"} <= numbers.keys()
    assert "win_rate" not in numbers
    assert len(load_pairs(str(tmp_path / "cell" / "clean.jsonl")).pairs) == 12
    with pytest.raises(UsageError, match="has 12 pairs, but the target needs 50"):
        files.run(Cell("mspo", 0, clean_pairs=50), tmp_path / "too_many")


def test_the_version_follows_model_and_files(tmp_path, monkeypatch):
    world = prepare_world(replace(SMALL, sft_rows=64), 3, tmp_path / "own")
    files = FilesPreset(world.sft, *(world.pairs(name) for name in ("train", "clean", "eval")))
    version = files.version
    assert replace(files, test=world.pairs("clean")).version != version
    assert files.version == version


def test_recipe_and_known_noise_rate_reach_the_options():
    def config(**special):
        cell = Cell("cdpo", 3, **special)
        return _config(cell, for_recipe(cell, alignment("cdpo", 3)))

    assert config().noise_rate is None
    given = config(noise_rate_source="given")
    assert (given.noise_rate, given.learning_rate) == (0.4, 5e-4)
    faithful = config(recipe="faithful")
    assert (faithful.learning_rate, faithful.beta, faithful.tuning) == (5e-7, 0.1, "full")
    assert faithful.per_device_train_batch_size * faithful.gradient_accumulation_steps == 64
    official = Cell("perpcorrect", 3, perpcorrect_mode="official")
    assert _config(official, alignment("perpcorrect", 3)).perpcorrect_mode == "official"
