"""Runs whose meta-learner sees other signals than PPLDiff, or teaches in another loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from softpref.algorithm.objective import CROSS_ENTROPY, GEOMETRIC, Objective
from softpref.algorithm.signals import PPL_DIFF, SIGNALS, STARTING_PPL_DIFF
from softpref.errors import UsageError
from softpref.models.scoring import starting_signals
from softpref.training.step import StepRunner
from tests.toy import exact_trainer, toy_config, toy_trainer

BOTH = ["ppl_diff", "margin"]


def test_what_a_meta_learner_sees_unless_told_otherwise(tmp_path):
    assert toy_config(tmp_path).resolved_signals() == (PPL_DIFF,)
    assert toy_config(tmp_path, method="mspo_static").resolved_signals() == (STARTING_PPL_DIFF,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dpo"}, "signals: method dpo does not read it"),
        ({"method": "mspo_static"}, "signals: method mspo_static does not read it"),
        ({"signals": ["ppl_dif"]}, "signals=\"ppl_dif\": choose from ppl_diff, .*mean 'ppl_diff'"),
        ({"signals": ["margin", "margin"]}, "signals: give at least one name, and none twice"),
        ({"signals": []}, "signals: give at least one name"),
    ],
)
def test_signals_that_cannot_be_seen_are_refused(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        toy_config(tmp_path, **({"signals": BOTH} | options))


def test_a_signals_column_is_its_value_under_the_starting_policy(tmp_path):
    trainer = toy_trainer(tmp_path, signals=list(SIGNALS))
    scored = trainer._score(trainer.pairs, "scoring")
    expected = torch.stack([signal.of(scored).float() for signal in SIGNALS.values()], -1)
    found = starting_signals(trainer.pairs, list(SIGNALS.values()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    deviation = trainer.start.labeller.deviation
    assert deviation[list(SIGNALS).index("margin")] == 1  # it has no spread yet


@pytest.mark.parametrize("zscore", ["frozen", "running"])
def test_a_run_on_two_signals_resumes_to_the_bit(zscore, tmp_path):
    options = {"signals": BOTH, "zscore": zscore, "max_steps": 4, "warmup_steps": 0}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = toy_trainer(tmp_path / "a", **options)
    before = whole.start.labeller.layers[0].weight.clone()
    whole.train()
    assert (whole.start.labeller.layers[0].weight != before).any(0).all()  # each signal teaches
    assert (float(whole.start.labeller.deviation[1]) == 1) == (zscore == "frozen")
    toy_trainer(tmp_path / "b", **(options | saving)).train()
    with pytest.raises(UsageError, match="signals was"):
        toy_trainer(tmp_path / "b", **(options | {"signals": ["ppl_diff"]})).train(
            resume_from_checkpoint=str(tmp_path / "b" / "run" / "checkpoint-2")
        )
    resumed = toy_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / "checkpoint-2"))
    for one, other in (
        (resumed.policy, whole.policy),
        (resumed.start.labeller, whole.start.labeller),
    ):
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    labels = whole.label_pairs()
    assert labels.to_list() == resumed.label_pairs().to_list()
    assert all(0 <= p <= 1 for p in labels["p_correct"])


def steps_of(trainer, loss):
    args, start = trainer.args, trainer.start
    objective, size = Objective(loss, args.beta), args.per_device_train_batch_size
    return StepRunner(start.labeller, objective, start.layout.collate, size, args.ppl_scope)


def taught_by(trainer, loss):
    """The step, and the gradient that φ was given."""
    found = []
    parameters = list(trainer.start.labeller.parameters())
    trainer.teacher.optimizer = SimpleNamespace(
        step=lambda: found.extend(p.grad.clone() for p in parameters),
        zero_grad=lambda: [setattr(p, "grad", None) for p in parameters],
    )
    steps = steps_of(trainer, loss)
    pairs, clean = trainer.pairs.to_list()[:8], trainer.clean.to_list()[:4]
    done = steps.taught(trainer.policy, pairs, clean, trainer.teacher, trainer.start.engine, 1e-9)
    return done, torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("loss", [GEOMETRIC, CROSS_ENTROPY])
def test_a_step_that_teaches_trains_in_the_loss_of_one_that_does_not(loss, tmp_path):
    trainer = exact_trainer(tmp_path)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():  # at a margin of 0 the losses teach alike
            parameter += 0.3 * torch.randn_like(parameter)
    steps = steps_of(trainer, loss)
    plain = steps.plain(trainer.policy, trainer.pairs.to_list()[:8])
    done, by_loss = taught_by(trainer, loss)
    _, by_other = taught_by(trainer, CROSS_ENTROPY if loss is GEOMETRIC else GEOMETRIC)
    torch.testing.assert_close(done.update.loss, plain.update.loss)
    for a, b in zip(done.update.gradient, plain.update.gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert (by_loss - by_other).norm() > 1e-2 * by_loss.norm()
