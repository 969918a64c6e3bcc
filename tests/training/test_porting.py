"""What callers of TRL and transformers bring is honoured, or refused with what to do."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import DatasetDict
from transformers import TrainerCallback, TrainingArguments

import softpref
from softpref.auditing.finished_run import options_of_run
from softpref.auditing.options import AuditOptions
from softpref.errors import UsageError
from softpref.models.quantized import RUN_RECORD
from softpref.training.config import MSPOConfig
from softpref.training.output import write_lines
from softpref.training.porting import ARGUMENTS, OPTIONS
from softpref.training.trainer import MSPOTrainer
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model
from tests.toy import toy_config, toy_pairs, toy_trainer


def trainer_of(tmp_path, model=None, train=None, clean=None, evaluation=None, options=None, **more):
    return MSPOTrainer(
        model or tiny_model(dtype=torch.float32, attention="sdpa"),
        toy_config(tmp_path, **({"method": "dpo", "max_steps": 1} | (options or {}))),
        toy_pairs(16) if train is None else train,
        clean,
        evaluation,
        processing_class=make_tokenizer(),
        **more,
    )


def test_every_form_of_pairs_gives_the_same_rows(tmp_path):
    pairs = toy_pairs(12)
    write_lines(tmp_path / "pairs.jsonl", pairs)
    frame = pairs.to_pandas()
    frame.index = list(reversed(range(12)))
    forms = [pairs.to_list(), frame, tmp_path / "pairs.jsonl", str(tmp_path / "pairs.jsonl"),
             [tmp_path / "pairs.jsonl"]]  # fmt: skip
    expected = trainer_of(tmp_path, train=pairs).pairs.to_list()
    for form in forms:
        assert trainer_of(tmp_path, train=form).pairs.to_list() == expected


def test_evaluation_sets_are_measured_under_their_names(tmp_path):
    a, b = toy_pairs(6, 2), toy_pairs(5, 3)
    told = []

    class Tell(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            told.append(min(metrics.keys() - {"epoch"}))

    trainer = trainer_of(tmp_path, evaluation=DatasetDict(a=a, b=b), callbacks=[Tell()])
    both = trainer.evaluate()
    for name, pairs in (("a", a), ("b", b)):
        alone = trainer_of(tmp_path, evaluation=pairs).evaluate()
        for metric in alone.keys() - {"epoch"}:
            renamed = metric.replace("eval_", f"eval_{name}_", 1)
            assert both[renamed] == pytest.approx(alone[metric]), renamed
    assert len(both) == 2 * len(alone) - 1
    assert told == ["eval_a_logps/chosen", "eval_b_logps/chosen"]


def test_compute_metrics_gets_implicit_rewards(tmp_path):
    seen = []

    def compute(prediction):
        seen.append(prediction)
        right = prediction.predictions.argmax(-1) == prediction.label_ids
        return {"right": float(right.mean())}

    trainer = trainer_of(
        tmp_path,
        evaluation=toy_pairs(6, 2),
        compute_metrics=compute,
        options={"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0},
    )
    trainer.train()
    metrics = trainer.evaluate()
    rewards = seen[-1].predictions
    assert rewards.shape == (6, 2)
    assert float(rewards[:, 0].mean()) == pytest.approx(metrics["eval_rewards/chosen"], abs=1e-5)
    assert float(rewards[:, 1].mean()) == pytest.approx(metrics["eval_rewards/rejected"], abs=1e-5)
    assert metrics["eval_right"] == pytest.approx(metrics["eval_rewards/accuracies"])


def test_an_optimizer_and_schedule_of_the_callers_are_used(tmp_path):
    model = tiny_model(dtype=torch.float32, attention="sdpa")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    trainer = trainer_of(tmp_path, model=model, optimizers=(optimizer, schedule))
    trainer.train()
    assert trainer.lr_scheduler is schedule
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"warmup_steps": 0}
    trainer_of(tmp_path, model=model, options=options, optimizers=(optimizer, None)).train()
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_optimizer_of_other_weights_is_refused(tmp_path):
    model = tiny_model(dtype=torch.float32, attention="sdpa")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(UsageError, match="optimizers: the optimizer has other weights"):
        trainer_of(tmp_path, model=model, options={"tuning": "lora"}, optimizers=(optimizer, None))
    with pytest.raises(UsageError, match="optimizers: give a pair"):
        trainer_of(tmp_path, model=model, optimizers=optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(UsageError, match="optimizers: give the optimizer"):
        trainer_of(tmp_path, optimizers=(None, schedule))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_other_trainers_may_be_none_or_are_refused(name, tmp_path):
    with pytest.raises(UsageError, match=f"^{name}: "):
        MSPOTrainer("m", **{name: object()})
    with pytest.raises(UsageError, match="train_dataset is missing"):
        MSPOTrainer("m", MSPOConfig(str(tmp_path), method="dpo", use_cpu=True), **{name: None})


def test_unknown_arguments_and_options_have_a_hint(tmp_path):
    with pytest.raises(UsageError, match="no such argument; did you mean 'train_dataset'"):
        MSPOTrainer("m", train_datset=[])
    with pytest.raises(UsageError, match="no such option; did you mean 'learning_rate'"):
        MSPOConfig(str(tmp_path), learning_rat=1e-4)
    for name in OPTIONS:
        with pytest.raises(UsageError, match=f"^{name}: "):
            MSPOConfig(str(tmp_path), **{name: 1})
    with pytest.raises(UsageError, match="args is of type TrainingArguments: give softpref.MSPO"):
        MSPOTrainer("m", TrainingArguments(str(tmp_path), use_cpu=True), toy_pairs(3))


def test_every_option_of_trls_dpo_has_a_place():
    trl = pytest.importorskip("trl")
    own = set(MSPOConfig.__dataclass_fields__)
    theirs = set(trl.DPOConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    assert not OPTIONS.keys() & own
    assert theirs - own - OPTIONS.keys() == set()


def test_clean_pairs_may_be_held_out_by_number(tmp_path):
    trainer = trainer_of(tmp_path, train=toy_pairs(40), clean=12)
    assert (len(trainer.pairs), len(trainer.clean)) == (28, 12)
    assert trainer.origin.clean == "truth restored"


def test_a_run_saved_from_python_is_one_that_an_audit_takes(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", toy_pairs(40, flip_every=3))
    output = tmp_path / "saved"
    output.mkdir()
    (output / "log.txt").write_text("of the caller")
    trainer = toy_trainer(
        tmp_path, train=tmp_path / "pairs.jsonl", evaluation=toy_pairs(6, 2), max_steps=1
    )
    trainer.save_model(str(tmp_path / "before"))  # not trained: the model alone
    assert not (tmp_path / "before" / RUN_RECORD).exists()
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(output))
    (output / "log.txt").write_text("and more")
    record = json.loads((output / RUN_RECORD).read_text())
    assert record["evaluation"] == metrics
    assert record["files"]["train"] == str(tmp_path / "pairs.jsonl")
    assert record["files"]["clean"] is None
    sealed = json.loads((output / "manifest.json").read_text())["files"]
    written = {path.name for path in output.iterdir()} - {"manifest.json", "README.md", "log.txt"}
    assert sealed.keys() == written
    assert {"labels.jsonl", "metrics.jsonl", "meta_learner.safetensors"} <= written
    with pytest.raises(UsageError, match="--run .* were objects in memory .*: give --clean"):
        options_of_run(AuditOptions(run=str(output)))
    found = softpref.audit(
        run=output, clean=toy_pairs(16, seed=1), reference_cache=str(tmp_path / "cache")
    )
    assert found.pairs["soft_label"][0] is not None
    assert len(found.pairs) == 40


def test_reprs_say_what_a_thing_is_in_one_line(tmp_path):
    trainer = toy_trainer(tmp_path, noise_rate=0.2, warm_start=False)
    assert repr(trainer) == ("<MSPOTrainer: mspo, full, 40 pairs, 16 clean; step 0 of 5>")
    assert repr(trainer.start.labeller).startswith("<MetaLearner of ppl_diff: two hidden layers of")
    assert repr(trainer.start.noise) == "<NoiseRate 20.0% (95% interval 20.0% to 20.0%)>"
