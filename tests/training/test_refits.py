"""Runs of method `evidence`: what is fitted when, whose label is kept, and how a run resumes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from softpref.algorithm.evidence_labeller import EvidenceLabeller
from softpref.algorithm.labeller import AsGiven
from softpref.models.reference import SIGNAL_COLUMNS
from softpref.statistics.evidence import Evidence
from softpref.statistics.noise_rate import NoiseRate
from softpref.training import refits
from softpref.training.labels import LabelHistory
from tests.toy import exact_trainer, toy_pairs, toy_trainer

PAIRS = 64
A_PASS = 16
"""Steps of four pairs; the labeller is fitted after each 32 pairs, for 24 trusted ones."""


@pytest.fixture(autouse=True)
def speaks(monkeypatch):
    """The toy's evidence is weak, so that it might be heard on one machine and not on another."""
    monkeypatch.setattr(Evidence, "speaks", True)
    monkeypatch.setattr(refits, "NOISY_A_TRUSTED", 32 / 24)


def options(**more) -> dict:
    return {
        "method": "evidence", "train": toy_pairs(PAIRS, flip_every=3),
        "clean": toy_pairs(24, seed=1), "max_steps": 2 * A_PASS, "warmup_steps": 0,
        "learning_rate": 1e-2, "gradient_accumulation_steps": 1,
    } | more  # fmt: skip


def weights(trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two passes over the pairs, and what each fit was given."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Evidence, "speaks", True)
        monkeypatch.setattr(refits, "NOISY_A_TRUSTED", 32 / 24)
        saving = {"save_strategy": "steps", "save_steps": 12}
        trainer = toy_trainer(tmp_path_factory.mktemp("run"), **options(**saving))
    fits, refit = [], trainer.start.labeller.refit

    def spy(*given: Tensor) -> None:
        policy = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
        fits.append((trainer.state.global_step, policy, given))
        refit(*given)

    trainer.start.labeller.refit = spy
    trainer.train()
    return trainer, fits


def test_a_fit_is_given_first_visits_and_the_trusted_pairs_as_they_are(run):
    trainer, fits = run
    assert [step for step, *_ in fits] == [8]  # before the next one every pair has its label
    step, policy, (noisy_g, noisy_h, trusted_g, trusted_h) = fits[0]
    history = trainer.history.tensors()
    before = history["step"] <= step
    g = trainer.pairs["evidence"]
    assert noisy_g.tolist() == [g[i] for i in history["index"][before].tolist()]
    assert torch.equal(noisy_h, history["margin"][before])
    assert trusted_g.tolist() == list(trainer.clean["evidence"])
    finished = trainer.policy.state_dict()
    finished = {name: value.clone() for name, value in finished.items()}
    trainer.policy.load_state_dict(policy)
    expected = trainer._score(trainer.clean, "scoring").margin
    trainer.policy.load_state_dict(finished)
    assert torch.equal(trusted_h, expected)
    assert trusted_h.abs().max() > 0.1
    assert trainer.start.labeller.coefficients.abs().max() > 0.01


def test_a_label_is_made_of_evidence_and_margin_once(run):
    trainer, _ = run
    history = trainer.history.tensors()
    g, first = trainer.pairs["evidence"], {}
    records = list(zip(*(history[n].tolist() for n in ("index", "soft_label")), strict=True))
    for index, label in records:
        assert first.setdefault(index, label) == label
    assert len(records) == 2 * len(first) == 2 * PAIRS
    labeller = EvidenceLabeller(trainer.start.noise.expected)
    prior = torch.logit(torch.tensor(1 - trainer.start.noise.expected)).item()
    for index, label in records[: 8 * 4]:  # before the first fit the margin says nothing
        known = 2 * torch.tanh(torch.tensor(g[index]) / 2)
        assert label == pytest.approx(float((known + prior).sigmoid()), abs=1e-5)
    late = history["step"] > 8
    late[4 * A_PASS :] = False
    labeller.coefficients, labeller.size = (
        trainer.start.labeller.coefficients,
        trainer.start.labeller.size,
    )
    known = 2 * torch.tanh(torch.tensor([g[i] for i in history["index"][late].tolist()]) / 2)
    columns = labeller._columns(known.double(), history["margin"][late].double())
    label = (known + columns @ labeller.coefficients + prior).sigmoid()
    torch.testing.assert_close(history["soft_label"][late].double(), label, rtol=1e-5, atol=1e-6)


def test_labels_of_a_run_are_probabilities_that_were_trained_with(run):
    trainer, _ = run
    labels, history = trainer.label_pairs(), trainer.history.tensors()
    assert labels["soft_label"] == labels["p_correct"]
    assert labels["evidence"] == trainer.pairs["evidence"]
    last = dict(zip(history["index"].tolist(), history["soft_label"].tolist(), strict=True))
    assert list(labels["soft_label"]) == [last[i] for i in range(PAIRS)]
    assert len(set(labels["soft_label"])) > PAIRS / 2


def test_pairs_never_trained_on_have_a_label_too(tmp_path):
    trainer = toy_trainer(tmp_path, **options(max_steps=1))
    trainer.train()
    assert None not in trainer.label_pairs()["soft_label"]


def test_signals_do_not_travel_with_the_pairs(run):
    trainer, _ = run
    for pairs in (trainer.pairs, trainer.clean):
        assert "evidence" in pairs.column_names
        assert not set(SIGNAL_COLUMNS) & set(pairs.column_names)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run, tmp_path):
    whole, _ = run
    resumed = toy_trainer(tmp_path, **options())
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-12")
    assert torch.equal(weights(resumed), weights(whole))
    for name, column in whole.history.tensors().items():
        assert torch.equal(resumed.history.tensors()[name], column)
    assert torch.equal(resumed.start.labeller.coefficients, whole.start.labeller.coefficients)
    assert resumed.label_pairs().to_list() == whole.label_pairs().to_list()


def test_micro_batches_of_any_size_are_one_step(tmp_path):
    ends = [
        exact_trainer(tmp_path / str(size), **options(
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=10,
            train=toy_pairs(96, flip_every=3),
        ))
        for size in (2, 4)
    ]  # fmt: skip
    for trainer in ends:
        trainer.train()
    assert all(trainer.start.labeller.coefficients.abs().max() > 0.01 for trainer in ends)
    assert (weights(ends[0]) - weights(ends[1])).norm() < 1e-6 * weights(ends[0]).norm()


def test_where_nothing_speaks_a_run_is_dpo_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(Evidence, "speaks", False)
    silent, dpo = (
        toy_trainer(tmp_path / method, **options(method=method, max_steps=10))
        for method in ("evidence", "dpo")
    )
    assert isinstance(silent.start.labeller, AsGiven)
    for trainer in (silent, dpo):
        trainer.train()
    assert torch.equal(weights(silent), weights(dpo))
    for name, column in dpo.history.tensors().items():
        assert torch.equal(silent.history.tensors()[name], column)
    assert set(silent.label_pairs()["soft_label"]) == {None}


def test_where_nothing_speaks_a_run_claims_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "softpref")
    monkeypatch.setattr(Evidence, "speaks", False)
    trainer = toy_trainer(tmp_path, **options(max_steps=1))
    trainer.train()
    trainer.save_model()
    labels = trainer.label_pairs()
    assert set(labels["p_correct"]) == {None}
    assert set(labels["evidence"]) == set(trainer.clean["evidence"]) == {0.0}
    assert "noise rate: unknown, the signals say too little" in caplog.text
    assert "noise rate that evidence assumes" not in caplog.text
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["noise_rate"] == NoiseRate.unknown().record()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "wrong labels among the training pairs | unknown, the signals say too little" in card


def test_a_meta_learner_of_evidence_that_does_not_speak_knows_no_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(Evidence, "speaks", False)
    given = {"method": "mspo", "meta_batch_size": 8, "meta_every": 1, "signals": ["evidence"]}
    trainer = toy_trainer(tmp_path, **options(**given, max_steps=2))
    trainer.train()
    assert len(set(trainer.label_pairs()["p_correct"])) == 1


def test_a_given_noise_rate_is_the_labels_prior(tmp_path):
    trainer = toy_trainer(tmp_path, **options(noise_rate=0.2, max_steps=1))
    trainer.train()
    history = trainer.history.tensors()
    g = torch.tensor(trainer.pairs["evidence"])[history["index"]].double()
    expected = (2 * torch.tanh(g / 2) + torch.tensor(4.0).log()).sigmoid()
    torch.testing.assert_close(history["soft_label"].double(), expected, rtol=1e-5, atol=1e-6)


def record(step: int, index: list[int]) -> dict[str, Tensor]:
    places = torch.tensor(index)
    numbers = 100.0 * step + places
    return {"step": torch.full_like(places, step), "index": places,
            **dict.fromkeys(("ppl_diff", "soft_label", "margin"), numbers)}  # fmt: skip


def test_first_visits_are_found_among_later_ones():
    every = torch.ones(7, dtype=torch.bool)
    parts = [record(1, [4, 2]), record(2, [0, 5]), record(3, [2, 1]), record(4, [3, 4])]
    history = LabelHistory()
    history.restore({name: torch.cat([p[name] for p in parts]) for name in parts[0]})
    found = history.first_visits(every, 100)
    assert found["index"].tolist() == [4, 2, 0, 5, 1, 3]
    assert found["margin"].tolist() == [104, 102, 200, 205, 301, 403]
    assert history.first_visits(every, 2)["index"].tolist() == [1, 3]
    assert history.first_visits(torch.arange(7) != 3, 2)["index"].tolist() != [1, 3]
    assert len(LabelHistory().first_visits(every, 2)["index"]) == 0


def test_only_the_latest_pairs_are_fitted_on(tmp_path, monkeypatch):
    monkeypatch.setattr(refits, "LATEST", 6)
    trainer, seen = toy_trainer(tmp_path, **options(max_steps=9)), []
    refit = trainer.start.labeller.refit
    trainer.start.labeller.refit = lambda *given: (seen.append(given[1]), refit(*given))
    trainer.train()
    assert torch.equal(seen[0], trainer.history.tensors()["margin"][26:32])
