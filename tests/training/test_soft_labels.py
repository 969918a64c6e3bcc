"""Weights, margins, votes, scores and ties from the user's columns to the training set."""

import json
import math

import pytest
import torch
from datasets import Dataset

from softpref.algorithm.methods import METHODS
from softpref.data.readers import column
from softpref.errors import UsageError
from softpref.options import facts_of
from softpref.statistics.score_temperature import fit_temperature
from softpref.training.config import MSPOConfig
from softpref.training.trainer import MSPOTrainer
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model
from tests.toy import toy_config, toy_pairs, toy_trainer

PAIRS = 24


def with_columns(pairs: Dataset, **columns) -> Dataset:
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)
    return pairs


def numbers(trainer: MSPOTrainer, name: str) -> torch.Tensor:
    return torch.tensor(column(trainer.pairs, name).to_numpy())


def read_of(trainer: MSPOTrainer) -> dict:
    record = trainer.start.sets.record["train"]["columns_read"]
    return json.loads(json.dumps(record))


WEIGHTS = [0.0, 0.5, 2.0, 1.0] * 6
TIES = ["tie" if n % 5 == 0 else "" for n in range(PAIRS)]


def test_weights_and_target_margins_reach_the_training_set(tmp_path, caplog):
    caplog.set_level("INFO")
    margins = [n / 4 for n in range(PAIRS)]
    train = with_columns(toy_pairs(PAIRS), weight=WEIGHTS, margin=margins, label=TIES)
    clean = with_columns(toy_pairs(16, seed=1), weight=[3.0] * 16, margin=[1.0] * 16)
    other = with_columns(toy_pairs(8, seed=2), weight=[3.0] * 8)
    trainer = toy_trainer(tmp_path, method="dpo", train=train, clean=clean, evaluation=other)
    assert numbers(trainer, "weight").tolist() == WEIGHTS
    assert numbers(trainer, "target_margin").tolist() == [m / 0.1 for m in margins]
    given = numbers(trainer, "given_label")
    assert given.dtype == torch.float64
    assert given.isnan().tolist() == [not tie for tie in TIES]
    assert set(given[~given.isnan()].tolist()) == {0.5}
    for other in (trainer.clean, *trainer.start.sets.evaluation.values()):
        assert not {"weight", "margin", "target_margin", "given_label"} & {*other.column_names}
    assert read_of(trainer) == {
        "weight": {"mean": pytest.approx(0.875)},
        "margin": {"mean": pytest.approx(2.875)},
        "label": {"ties": 5},
    }
    line = "columns read: weight (mean 0.875), margin (mean 2.88), label (ties 5)"
    assert line in caplog.text


def test_a_run_without_such_columns_says_nothing_of_them(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = toy_trainer(tmp_path, method="dpo")
    assert "columns read" not in caplog.text
    assert read_of(trainer) == {}
    assert not {"weight", "target_margin", "given_label", "label"} & {*trainer.pairs.column_names}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_reads_ties_and_weights(method, tmp_path):
    train = with_columns(toy_pairs(PAIRS, flip_every=3), weight=WEIGHTS, label=TIES)
    trainer = toy_trainer(tmp_path, method=method, train=train)
    given = numbers(trainer, "given_label")
    tied = torch.tensor([bool(tie) for tie in TIES])
    assert set(given[tied].tolist()) == {0.5}
    if method == "oracle":
        assert torch.equal(given[~tied], 1 - numbers(trainer, "is_flipped")[~tied].double())
    else:
        assert given[~tied].isnan().all()
    assert "weight" in METHODS[method].reads


@pytest.mark.parametrize("method", sorted(METHODS))
def test_margins_are_read_or_refused_by_name(method, tmp_path):
    train = with_columns(toy_pairs(PAIRS), margin=[0.5] * PAIRS)
    if "margin" in METHODS[method].reads:
        assert "target_margin" in toy_trainer(tmp_path, method=method, train=train).pairs.features
        return
    refused = f'carry `margin`, which method="{method}" does not read: drop the column, or choose'
    with pytest.raises(UsageError, match=refused):
        toy_trainer(tmp_path, method=method, train=train)


def test_weights_of_zero_alone_are_refused(tmp_path):
    train = with_columns(toy_pairs(PAIRS), weight=[0.0] * PAIRS)
    with pytest.raises(UsageError, match="`weight` of every training pair is 0"):
        toy_trainer(tmp_path, method="dpo", train=train)


@pytest.mark.parametrize("changed", ["weight", "margin"])
def test_a_run_does_not_resume_with_other_weights_or_margins(changed, tmp_path):
    def identity(value):
        train = with_columns(toy_pairs(PAIRS), **{changed: [value] * PAIRS})
        return toy_trainer(tmp_path, method="dpo", train=train).identity()

    first, again, other = (identity(value) for value in (1.0, 1.0, 2.0))
    assert first == again != other


def test_weights_do_not_have_the_reference_scored_again(tmp_path, monkeypatch):
    toy_trainer(tmp_path, method="dpo", train=toy_pairs(PAIRS))
    monkeypatch.setattr("softpref.models.reference.read_pairs", None)
    train = with_columns(toy_pairs(PAIRS), weight=WEIGHTS, label=TIES)
    toy_trainer(tmp_path, method="dpo", train=train)


VOTES = {"votes_for": [n % 7 for n in range(PAIRS)], "votes_against": [n % 3 for n in range(PAIRS)]}


@pytest.mark.parametrize("method", ["gdpo", "cdpo"])
def test_labels_by_votes(method, tmp_path, caplog):
    caplog.set_level("INFO")
    train = with_columns(toy_pairs(PAIRS), **VOTES)
    trainer = MSPOTrainer(
        tiny_model(dtype=torch.float32, attention="sdpa"),
        toy_config(tmp_path, method=method, soft_label_from="votes", max_steps=1),
        train.to_list(),
        processing_class=make_tokenizer(),
    )  # neither trusted pairs nor a noise rate
    expected = [(n % 7 + 1) / (n % 7 + n % 3 + 2) for n in range(PAIRS)]
    assert numbers(trainer, "given_label").tolist() == pytest.approx(expected, abs=1e-15)
    below = sum(n % 7 < n % 3 for n in range(PAIRS))
    equal = sum(n % 7 == n % 3 for n in range(PAIRS))
    assert (
        f"votes: of {PAIRS} training pairs {below} have the lower number of votes on the chosen "
        f"side, and {equal} are ties, label 1/2"
    ) in caplog.text
    assert read_of(trainer) == {
        "soft_label": {"from": "votes", "mean": pytest.approx(sum(expected) / PAIRS)}
    }
    assert "votes_for" not in trainer.pairs.column_names


def scored(pairs: Dataset, differences: list[float]) -> Dataset:
    return with_columns(
        pairs, score_chosen=[1 + d for d in differences], score_rejected=[1.0] * len(differences)
    )


DIFFERENCES = [(n % 8 - 2) / 2 for n in range(PAIRS)]
TRUSTED = [1.5, 0.5, -0.5, 2.0, 0.0, 1.0, 0.5, 3.0] * 2


def by_scores(tmp_path, trusted=TRUSTED, **options) -> MSPOTrainer:
    clean = scored(toy_pairs(len(trusted), seed=1), trusted)
    options = {"method": "gdpo", "train": scored(toy_pairs(PAIRS), DIFFERENCES)} | options
    return toy_trainer(tmp_path, clean=clean, soft_label_from="scores", **options)


def test_labels_by_scores(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = by_scores(tmp_path)
    temperature = fit_temperature(torch.tensor(TRUSTED))
    expected = [1 / (1 + math.exp(-d / temperature)) for d in DIFFERENCES]
    assert numbers(trainer, "given_label").tolist() == pytest.approx(expected, abs=1e-12)
    assert {round(p, 12) for p, d in zip(expected, DIFFERENCES, strict=True) if d == 0} == {0.5}
    assert "scores: of 24 training pairs 6 have the lower score on the chosen side, and 3" in (
        caplog.text
    )
    assert f"scores: T = {temperature:.3g} by 16 trusted pairs, 2 of them" in caplog.text
    assert "rests on its prior" not in caplog.text
    assert read_of(trainer)["soft_label"]["temperature"] == pytest.approx(temperature)
    for pairs in (trainer.pairs, trainer.clean):
        assert not {"score_chosen", "score_rejected"} & {*pairs.column_names}


def test_scores_that_no_trusted_pair_contradicts_are_warned_of(tmp_path, caplog):
    by_scores(tmp_path, trusted=[1.0] * 16)
    assert "no trusted pair contradicts the scores, so T rests on its prior" in caplog.text


def test_scores_against_the_trusted_labels_are_refused(tmp_path):
    with pytest.raises(UsageError, match="mean difference .* 16 trusted pairs"):
        by_scores(tmp_path, trusted=[-1.0] * 16)


def test_trusted_pairs_may_be_held_out_with_their_scores(tmp_path):
    trainer = MSPOTrainer(
        tiny_model(dtype=torch.float32, attention="sdpa"),
        toy_config(tmp_path, method="gdpo", soft_label_from="scores"),
        scored(toy_pairs(PAIRS + 10).remove_columns("is_flipped"), [*DIFFERENCES, *[0.3] * 10]),
        clean_dataset=10,
        processing_class=make_tokenizer(),
    )
    assert numbers(trainer, "given_label").isfinite().all()


def test_scores_need_trusted_pairs_with_scores(tmp_path):
    train = scored(toy_pairs(PAIRS), DIFFERENCES)
    with pytest.raises(UsageError, match="fits its temperature on trusted pairs .* give about 150"):
        MSPOTrainer(
            tiny_model(dtype=torch.float32, attention="sdpa"),
            toy_config(tmp_path, method="gdpo", soft_label_from="scores"),
            train,
            processing_class=make_tokenizer(),
        )
    with pytest.raises(UsageError, match="clean_dataset, row 1: has no score_chosen, which soft_l"):
        toy_trainer(tmp_path, method="gdpo", soft_label_from="scores", train=train)


def test_the_source_replaces_a_column_of_soft_labels_and_says_so(tmp_path, caplog):
    train = with_columns(toy_pairs(PAIRS), soft_label=[0.25] * PAIRS, **VOTES)
    trainer = toy_trainer(tmp_path, method="gdpo", soft_label_from="votes", train=train)
    assert numbers(trainer, "given_label")[1] == 2 / 4
    assert "soft_label is not read" in caplog.text
    trainer = toy_trainer(tmp_path, method="gdpo", train=train)
    assert set(numbers(trainer, "given_label").tolist()) == {0.25}


def test_a_column_that_was_asked_for_is_not_made_up(tmp_path):
    with pytest.raises(UsageError, match='soft_label_from="column": .* have no soft_label'):
        toy_trainer(tmp_path, method="gdpo", soft_label_from="column")
    with pytest.raises(UsageError, match="method mspo does not read it"):
        toy_config(tmp_path, method="mspo", soft_label_from="votes")


def test_a_tie_outweighs_other_labels_of_the_pair(tmp_path):
    train = with_columns(toy_pairs(PAIRS), soft_label=[0.9] * PAIRS, label=TIES)
    given = numbers(toy_trainer(tmp_path, method="gdpo", train=train), "given_label").tolist()
    assert given == [0.5 if tie else 0.9 for tie in TIES]


def test_ties_among_trusted_and_evaluation_pairs_are_dropped(tmp_path, caplog):
    caplog.set_level("INFO")
    clean = with_columns(toy_pairs(16, seed=1), label=["tie", *[""] * 15])
    evaluation = with_columns(toy_pairs(8, seed=2), label=[*[""] * 5, "tie", "Tie", "TIE"])
    trainer = toy_trainer(tmp_path, method="dpo", clean=clean, evaluation=evaluation)
    assert len(trainer.clean) == 15
    assert len(trainer.start.sets.evaluation["eval"]) == 5
    assert "clean_dataset: 1 of 16 pairs are ties, which teach nothing: dropped" in caplog.text
    assert "eval_dataset: 3 of 8 pairs are ties, which evaluate nothing" in caplog.text


def test_ties_do_not_count_as_noise(tmp_path):
    """Evidence and the noise rate are those of the same pairs without the ties."""
    train = toy_pairs(60, flip_every=3)
    some = [n for n in range(60) if n % 4]
    tied = with_columns(train, label=["" if n % 4 else "tie" for n in range(60)])
    found = [
        toy_trainer(tmp_path, method=method, train=pairs)
        for method in ("evidence", "rdpo")
        for pairs in (tied, train.select(some))
    ]
    for with_ties, without in (found[:2], found[2:]):
        assert with_ties.start.noise.record() == without.start.noise.record()
    evidence = numbers(found[0], "evidence")
    assert torch.equal(evidence[some], numbers(found[1], "evidence"))
    assert set(evidence[::4].tolist()) == {0.0}


def test_the_option_is_read_by_the_methods_whose_rows_say_so():
    facts = facts_of(MSPOConfig)["soft_label_from"]
    for source in ("soft_label", "votes", "scores"):
        assert set(facts["read_by"]) == {m.name for m in METHODS.values() if source in m.reads}
    assert {m.name for m in METHODS.values() if m.given_by == "soft_label"} == {*facts["read_by"]}
