"""RE-PO's reliabilities in training: whose they are, what they follow, and that they resume."""

from __future__ import annotations

import json

import pytest
import torch

from softpref.algorithm.posterior_labeller import FIRST_RELIABILITY
from softpref.training.reliabilities import reliabilities_of
from tests.toy import toy_pairs, toy_trainer

STEPS = {"method": "re_po", "max_steps": 6, "warmup_steps": 0, "learning_rate": 1e-2}


def annotated(count: int = 48):
    """Pairs of three annotators, one of whom errs always, and of nobody."""
    names = ["wrong", "right", "also right", ""]
    pairs = toy_pairs(count, flip_every=4)
    return pairs.add_column("annotator", [names[i % 4] or None for i in range(count)])


def test_labels_are_bayes_rule_and_reliabilities_follow_them(tmp_path):
    trainer = toy_trainer(tmp_path, train=annotated(), **STEPS)
    expected = dict.fromkeys(["also right", "right", "wrong", ""], FIRST_RELIABILITY)
    assert reliabilities_of(trainer.start.labeller, trainer.pairs) == expected
    trainer.train()
    history, beta = trainer.history.tensors(), trainer.args.beta
    names = [name or "" for name in trainer.pairs["annotator"]]
    for step in range(1, 7):
        of_step = history["step"] == step
        labels: dict[str, list[float]] = {}
        for i, h, p in zip(
            *(history[key][of_step].tolist() for key in ("index", "margin", "soft_label")),
            strict=True,
        ):
            odds = torch.tensor(expected[names[i]]).logit()
            assert p == pytest.approx(float((odds + beta * h).sigmoid()), abs=1e-5)
            labels.setdefault(names[i], []).append(p)
        for name, found in labels.items():
            expected[name] += 0.1 * (sum(found) / len(found) - expected[name])
    assert reliabilities_of(trainer.start.labeller, trainer.pairs) == pytest.approx(expected)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    options = STEPS | {"train": annotated(), "save_strategy": "steps", "save_steps": 3}
    whole = toy_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = toy_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    for mine, other in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(resumed.start.labeller.reliability, whole.start.labeller.reliability)
    for name, column in whole.history.tensors().items():
        assert torch.equal(resumed.history.tensors()[name], column)


def test_run_json_names_each_annotator(tmp_path):
    trainer = toy_trainer(tmp_path, train=annotated(), **STEPS)
    trainer.train()
    trainer.save_model()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["reliability"].keys() == {"also right", "right", "wrong", ""}


def test_a_tie_keeps_its_label_and_says_nothing_of_its_annotator(tmp_path):
    train = annotated().add_column("label", ["tie" if i % 4 == 0 else "" for i in range(48)])
    trainer = toy_trainer(tmp_path, train=train, **STEPS)
    trainer.train()
    history = trainer.history.tensors()
    ties = history["index"] % 4 == 0
    assert (history["soft_label"][ties] == 0.5).all()
    assert (history["soft_label"][~ties] != 0.5).all()
    found = reliabilities_of(trainer.start.labeller, trainer.pairs)
    assert found["wrong"] == FIRST_RELIABILITY != found["right"]
