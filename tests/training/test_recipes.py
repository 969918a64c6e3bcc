"""How long a recommended run is, by its number of pairs."""

import pytest

from softpref.training.config import MSPOConfig
from softpref.training.recipes import ENOUGH_STEPS, choose_meta_lr, choose_steps
from tests.toy import toy_pairs, toy_trainer


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (50, (1, 3)),
        (300, (1, 3)),
        (1000, (3, 3)),
        (1600, (4, 2)),
        (3000, (3, 1)),
        (100_000, (4, 1)),
    ],
)
def test_few_pairs_take_more_passes_and_then_smaller_steps(pairs, expected):
    assert choose_steps(pairs, 8, None, None) == expected


@pytest.mark.parametrize("pairs", [100, 267, 300, 799, 1601, 3200, 50_000])
def test_steps_are_about_enough_wherever_the_pairs_allow_it(pairs):
    micro_batches, epochs = choose_steps(pairs, 8, None, None)
    steps = pairs / (8 * micro_batches) * epochs
    assert steps > 0.66 * ENOUGH_STEPS or (micro_batches, epochs) == (1, 3)
    assert steps < 1.5 * ENOUGH_STEPS or (micro_batches, epochs) == (4, 1)


def test_what_was_given_stays():
    assert choose_steps(300, 8, 4, None) == (4, 3)
    assert choose_steps(1000, 8, None, 1.0) == (1, 1.0)
    assert choose_steps(3000, 8, None, 2.0) == (4, 2.0)
    assert choose_steps(300, 8, 2, 0.5) == (2, 0.5)


def test_several_processes_count_as_larger_micro_batches():
    assert choose_steps(3200, 8, None, None) == (4, 1)
    assert choose_steps(3200, 8 * 4, None, None) == (3, 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1, 3)),
        ({"num_train_epochs": 1.0}, (1, 1.0)),
        ({"gradient_accumulation_steps": 2}, (2, 3)),
        ({"max_steps": 5}, (4, 1.0)),
        ({"recipe": "faithful", "method": "dpo"}, (8, 1.0)),
    ],
)
def test_a_run_takes_what_is_recommended_for_its_pairs(tmp_path, given, expected):
    config = MSPOConfig(output_dir=str(tmp_path), **given)
    config.choose_steps(48)
    assert (config.gradient_accumulation_steps, config.num_train_epochs) == expected


def test_a_config_that_is_used_twice_is_chosen_for_anew(tmp_path, caplog):
    caplog.set_level("INFO")
    config = MSPOConfig(output_dir=str(tmp_path))
    config.choose_steps(48)
    chosen = "recommended for 48 pairs: gradient_accumulation_steps 1, num_train_epochs 3"
    assert chosen in caplog.text
    config.choose_steps(100_000)
    assert (config.gradient_accumulation_steps, config.num_train_epochs) == (4, 1)


def test_the_trainer_asks_for_its_own_number_of_pairs(tmp_path):
    given = {"gradient_accumulation_steps": None, "num_train_epochs": None, "method": "dpo"}
    trainer = toy_trainer(tmp_path, train=toy_pairs(48), **given)
    assert trainer.args.num_train_epochs == 3
    assert (
        trainer.args.total_steps(len(trainer.pairs))
        == 3 * 48 / trainer.args.per_device_train_batch_size
    )


def test_the_meta_learner_walks_equally_far_in_any_run():
    assert choose_meta_lr(1250) == 1e-4  # the paper's
    assert choose_meta_lr(5) == 1e-3
    assert choose_meta_lr(0) == 1e-3
