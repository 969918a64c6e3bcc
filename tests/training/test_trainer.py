from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from softpref.algorithm.labeller import MetaLearner
from softpref.errors import UsageError
from softpref.training.config import MSPOConfig
from softpref.training.trainer import MSPOTrainer
from softpref.world.language import make_tokenizer
from tests.models import tiny_model, with_lora
from tests.toy import toy_config, toy_pairs, toy_trainer


def weights(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("method", ["mspo", "mspo_static", "dpo"])
def test_a_run_moves_the_policy_and_logs_trls_metrics(method, tmp_path):
    trainer = toy_trainer(
        tmp_path, method=method, evaluation=toy_pairs(6, 2), eval_strategy="epoch"
    )
    before = weights(trainer.policy)
    trainer.train()
    assert not same(weights(trainer.policy), before)
    line = trainer.state.log_history[0]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
                 "logps/chosen", "logps/rejected", "labels/mean", "labels/below_half",
                 "ppl_diff/mean", "labels/clean", "labels/flipped", "labels/auroc",
                 "loss", "grad_norm", "learning_rate"):  # fmt: skip
        assert name in line, name
    assert ("meta/loss" in line) == (method != "dpo")
    assert any("eval_rewards/accuracies" in line for line in trainer.state.log_history)


def test_all_micro_batches_take_part_in_one_step(tmp_path):
    """8 pairs as 1 x 8 or 4 x 2 are the same step, look-ahead, meta-update and move alike."""
    after = []
    for size, parts in ((8, 1), (2, 4)):
        trainer = toy_trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            warmup_steps=0, max_steps=3, max_grad_norm=0.5,
        )  # fmt: skip
        trainer.train()
        after.append((weights(trainer.policy), weights(trainer.labeller)))
    for one, other in zip(*after, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["per_pair_recompute", "double_backward"])
def test_engines_agree_over_a_run(engine, tmp_path):
    runs = []
    for choice in ("per_pair", engine):
        trainer = toy_trainer(tmp_path, engine=choice, max_steps=3, warmup_steps=0)
        trainer.train()
        runs.append((weights(trainer.policy), weights(trainer.labeller)))
    for one, other in zip(*runs, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def test_evaluation_never_teaches(tmp_path):
    trainer = toy_trainer(tmp_path, evaluation=toy_pairs(6, 2))
    policy, phi, sampler = (
        weights(trainer.policy),
        weights(trainer.labeller),
        trainer.teacher.state(),
    )
    trainer.evaluate()
    assert same(weights(trainer.policy), policy)
    assert same(weights(trainer.labeller), phi)
    assert same(trainer.teacher.state()[0], sampler[0])


def test_truth_is_never_used_with_a_clean_file(tmp_path):
    """Permuting is_flipped changes no weight of policy or meta-learner."""
    pairs, results = toy_pairs(24, flip_every=3), []
    turned = pairs.remove_columns("is_flipped").add_column("is_flipped", pairs["is_flipped"][::-1])
    for train in (pairs, turned, pairs.remove_columns("is_flipped")):
        trainer = toy_trainer(tmp_path, train=train, max_steps=2)
        trainer.train()
        results.append(weights(trainer.policy) | weights(trainer.labeller))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_warm_up_with_alpha_zero_still_teaches(tmp_path):
    trainer = toy_trainer(tmp_path, warmup_steps=5, max_steps=1)
    before, phi = weights(trainer.policy), weights(trainer.labeller)
    trainer.train()
    assert same(weights(trainer.policy), before)
    assert not same(weights(trainer.labeller), phi)


def test_meta_every_teaches_at_that_interval(tmp_path):
    trainer = toy_trainer(tmp_path, meta_every=2, max_steps=4)
    trainer.train()
    taught = [i for i, line in enumerate(trainer.state.log_history[:4]) if "meta/loss" in line]
    assert taught == [0, 2]


def test_clipping_is_for_the_policy_alone(tmp_path):
    phis = []
    for norm in (1e-6, 0.0):  # 0 is no clipping
        trainer = toy_trainer(tmp_path, max_grad_norm=norm, max_steps=1)
        trainer.train()
        phis.append(weights(trainer.labeller))
    assert same(*phis)


def test_lora_trains_the_adapter_alone_and_the_reference_is_the_base(tmp_path):
    trainer = toy_trainer(tmp_path, tuning="lora", warmup_steps=0)
    base = {n: p.clone() for n, p in trainer.policy.named_parameters() if not p.requires_grad}
    assert all("lora" not in name for name in base)
    trainer.train()
    for name, parameter in trainer.policy.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name])
    first = trainer.state.log_history[0]
    assert abs(first["rewards/margins"]) < 1e-5  # a fresh adapter is the reference


def test_an_sft_adapter_is_its_own_reference(tmp_path):
    model = with_lora(tiny_model(dtype=torch.float32, attention="sdpa"))
    trainer = toy_trainer(tmp_path, model=model, tuning="lora", max_steps=1)
    trainer.train()
    assert abs(trainer.state.log_history[0]["rewards/margins"]) < 1e-5


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        trainer = toy_trainer(
            tmp_path, activation_checkpointing=checkpointing, tuning="lora", max_steps=2
        )
        trainer.train()
        results.append(weights(trainer.policy) | weights(trainer.labeller))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


def test_bf16_runs_and_keeps_what_trains_in_float32(tmp_path):
    trainer = toy_trainer(tmp_path, bf16=True, tuning="lora", max_steps=2)
    trainer.train()
    trained = [p for p in trainer.policy.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    assert all(torch.isfinite(p).all() for p in trained)


def test_dropout_is_off_while_training(tmp_path):
    model = tiny_model("gpt2", torch.float32, "sdpa")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    trainer = toy_trainer(tmp_path, model=model)
    trainer.policy.train()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(trainer.policy(ids).logits, trainer.policy(ids).logits)


def test_adamw_look_ahead_differs_from_plain_descent_after_the_first_step(tmp_path):
    phis = {}
    for lookahead in ("sgd", "adamw"):
        for steps in (1, 2):
            trainer = toy_trainer(
                tmp_path, lookahead=lookahead, max_steps=steps, warmup_steps=0,
                lr_scheduler_type="constant",
            )  # fmt: skip
            trainer.train()
            phis[lookahead, steps] = weights(trainer.labeller)
    assert same(phis["sgd", 1], phis["adamw", 1])
    assert not same(phis["sgd", 2], phis["adamw", 2])


def test_a_non_finite_pair_stops_the_step_and_is_named(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=1)
    broken = trainer.pairs.to_list()
    for row in broken:
        row["ref_chosen_logp"] = float("nan") if row["index"] == 7 else row["ref_chosen_logp"]
    trainer.train_dataset = trainer.pairs = type(trainer.pairs).from_list(broken[:8])
    before, phi = weights(trainer.policy), weights(trainer.labeller)
    with pytest.raises(UsageError, match=broken[7]["uid"]):
        trainer.train()
    assert same(weights(trainer.policy), before)
    assert same(weights(trainer.labeller), phi)


def test_labels_of_every_pair(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.train()
    labels = trainer.label_pairs()
    assert list(labels["uid"]) == list(trainer.pairs["uid"])
    assert labels.column_names == ["uid", "ppl_diff", "soft_label", "p_correct", "margin", "step"]
    assert all(0 <= p <= 1 for p in labels["soft_label"])
    assert all(0 <= p <= 1 for p in labels["p_correct"])
    assert sorted(set(labels["step"])) == [1, 2, 3, 4, 5]


def test_labels_without_a_meta_learner_or_clean_pairs_are_null(tmp_path):
    trainer = toy_trainer(tmp_path, method="dpo", max_steps=1)
    labels = trainer.label_pairs()
    assert set(labels["soft_label"]) == {None}
    assert None not in labels["p_correct"]
    assert set(labels["step"]) == {None}


def test_reference_is_cached_and_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    from softpref.training import reference

    passes = []
    score = reference.score_pairs
    monkeypatch.setattr(
        reference, "score_pairs", lambda *a, **k: passes.append(1) or score(*a, **k)
    )
    first = toy_trainer(tmp_path).pairs["ref_chosen_logp"]
    count = len(passes)
    second = toy_trainer(tmp_path).pairs["ref_chosen_logp"]
    assert len(passes) == count
    assert list(first) == list(second)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    third = toy_trainer(tmp_path).pairs["ref_chosen_logp"]
    assert len(passes) == 2 * count
    assert list(first) == list(third)
    toy_trainer(tmp_path, model=tiny_model("gpt2", torch.float32, "sdpa"))
    assert len(passes) == 3 * count


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_interrupted_and_resumed_is_uninterrupted(tuning, tmp_path):
    options = {"tuning": tuning, "save_strategy": "steps", "save_steps": 2, "meta_every": 2,
               "num_train_epochs": 2, "lookahead": "adamw"}  # fmt: skip
    whole = toy_trainer(tmp_path / "a", **options)
    whole.train()
    stopped = toy_trainer(tmp_path / "b", **options)
    stopped.add_callback(StopAfter(5))
    stopped.train()
    resumed = toy_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert same(weights(resumed.policy), weights(whole.policy))
    assert same(weights(resumed.labeller), weights(whole.labeller))
    assert same(resumed.teacher.state()[0], whole.teacher.state()[0])
    assert same(resumed.history.tensors(), whole.history.tensors())
    assert resumed.label_pairs().to_list() == whole.label_pairs().to_list()


def StopAfter(step):  # noqa: N802
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return Stop()


def test_resuming_another_run_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    toy_trainer(tmp_path, **options).train()
    for change in ({"beta": 0.2}, {"clean": toy_pairs(16, 5)}, {"train": toy_pairs(41)}):
        with pytest.raises(UsageError, match=r"beta|pairs"):
            toy_trainer(tmp_path, **(options | change)).train(resume_from_checkpoint=True)


def test_saved_model_loads(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert same(weights(loaded), weights(trainer.policy))
    assert json.loads((tmp_path / "run" / "training_args.json").read_text())["beta"] == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "--beta"),
        ({"beta": -1.0}, "--beta"),
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"meta_batch_size": 0}, "--meta_batch_size"),
        ({"max_length": 1}, "--max_length"),
        ({"noise_rate": 0.5}, "--noise_rate"),
        ({"method": "dpo", "meta_lr": 1e-3}, "dpo does not read it"),
        ({"method": "dpo", "noise_rate": 0.1}, "dpo does not read it"),
        ({"method": "ppo"}, "--method ppo"),
        ({"recipe": "best"}, "--recipe best"),
        ({"fp16": True}, "--bf16"),
        ({"engine": "double_backward", "activation_checkpointing": True}, "--engine auto"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        MSPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_sets_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(UsageError, match="larger than the clean set"):
        toy_trainer(tmp_path, meta_batch_size=17)
    with pytest.raises(UsageError, match="at least 10"):
        toy_trainer(tmp_path, clean=toy_pairs(9, 1), meta_batch_size=4)
    with pytest.raises(UsageError, match="evaluation set"):
        toy_trainer(tmp_path, evaluation=toy_pairs(16, 1))
    policy, config = tiny_model(dtype=torch.float32), toy_config(tmp_path)
    with pytest.raises(UsageError, match="--clean FILE"):
        MSPOTrainer(policy, config, toy_pairs(8), processing_class=make_tokenizer())


def test_recipes(tmp_path):
    faithful = MSPOConfig(output_dir=str(tmp_path), use_cpu=True, recipe="faithful")
    assert (faithful.learning_rate, faithful.meta_lr, faithful.warmup_steps) == (5e-7, 1e-4, 100)
    assert faithful.tuning == "full"
    assert faithful.warm_start is False
    assert faithful.ppl_scope == "sequence_per_response_token"
    assert faithful.per_device_train_batch_size * faithful.gradient_accumulation_steps == 64
    recommended = MSPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (recommended.tuning, recommended.warm_start) == ("lora", True)
    assert recommended.resolved_meta_lr(10) > recommended.resolved_meta_lr(1000)
    overridden = MSPOConfig(output_dir=str(tmp_path), use_cpu=True, learning_rate=3e-6)
    assert overridden.learning_rate == 3e-6


def test_the_z_score_is_the_starting_policys(tmp_path):
    trainer = toy_trainer(tmp_path, warm_start=False)
    start = torch.tensor(trainer.pairs["starting_ppl_diff"])
    assert isinstance(trainer.labeller, MetaLearner)
    torch.testing.assert_close(trainer.labeller.mean, start.mean().float())
    torch.testing.assert_close(trainer.labeller.deviation, start.std().float())
    trainer.train()
    torch.testing.assert_close(trainer.labeller.mean, start.mean().float())
    running = toy_trainer(tmp_path, zscore="running")
    running.train()
    assert not torch.allclose(running.labeller.mean, start.mean().float())
