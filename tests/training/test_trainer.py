from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from softpref.algorithm.bilevel import mspo_step
from softpref.algorithm.gradients.jacobian import kept
from softpref.algorithm.labeller import MetaLearner
from softpref.algorithm.likelihood import measure
from softpref.algorithm.objective import GEOMETRIC, Objective
from softpref.data import make_batch
from softpref.errors import UsageError
from softpref.models.layout import choose_layout
from softpref.models.scoring import Scorer
from softpref.statistics.noise_rate import NoiseRate
from softpref.training import start
from softpref.training.config import MSPOConfig
from softpref.training.teacher import CleanSampler
from softpref.training.trainer import MSPOTrainer
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model, with_lora
from tests.toy import exact_trainer, toy_config, toy_pairs, toy_trainer


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
    *_, last = (line for line in trainer.state.log_history if "loss" in line)
    so_far = trainer.history.auroc(torch.tensor(trainer.pairs["is_flipped"][:]))
    assert last["labels/auroc"] == so_far["labels/auroc"]
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
        trainer = exact_trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            warmup_steps=0, max_steps=3, max_grad_norm=0.5,
        )  # fmt: skip
        trainer.train()
        after.append((weights(trainer.policy), weights(trainer.start.labeller)))
    for one, other in zip(*after, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("engine", ["graph", "recompute", "double_backward"])
def test_engines_agree_over_a_run(engine, tmp_path):
    runs = []
    for choice in ("kept", engine):
        trainer = exact_trainer(tmp_path, engine=choice, max_steps=3, warmup_steps=0)
        trainer.train()
        runs.append((weights(trainer.policy), weights(trainer.start.labeller)))
    for one, other in zip(*runs, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-9)


def test_a_start_scores_nothing_twice(tmp_path):
    model, passes = tiny_model(dtype=torch.float32, attention="sdpa"), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    toy_trainer(tmp_path, model=model, method="dpo", tuning="lora")
    causality, layout, under_the_adapter, training_pairs, trusted_pairs = 2, 2, 1, 40 / 8, 16 / 8
    assert len(passes) == causality + layout + under_the_adapter + training_pairs + trusted_pairs


def test_another_trial_under_the_adapter_changes_no_bit(tmp_path, monkeypatch):
    runs = []
    for _ in range(2):
        trainer = toy_trainer(tmp_path, tuning="lora", max_steps=2, warmup_steps=0)
        trainer.train()
        found = weights(trainer.policy) | weights(trainer.start.labeller)
        runs.append((found | trainer.history.tensors(), trainer.label_pairs().to_list()))
        monkeypatch.setattr(start, "layout_with_adapter", lambda _, *given: choose_layout(*given))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_evaluation_never_teaches(tmp_path):
    trainer = toy_trainer(tmp_path, evaluation=toy_pairs(6, 2))
    policy, phi, sampler = (
        weights(trainer.policy),
        weights(trainer.start.labeller),
        trainer.teacher.state(),
    )
    trainer.evaluate()
    assert same(weights(trainer.policy), policy)
    assert same(weights(trainer.start.labeller), phi)
    assert same(trainer.teacher.state()[0], sampler[0])


def test_truth_is_never_used_with_a_clean_file(tmp_path):
    """Permuting is_flipped changes no weight of policy or meta-learner."""
    pairs, results = toy_pairs(24, flip_every=3), []
    turned = pairs.remove_columns("is_flipped").add_column("is_flipped", pairs["is_flipped"][::-1])
    for train in (pairs, turned, pairs.remove_columns("is_flipped")):
        trainer = toy_trainer(tmp_path, train=train, max_steps=2)
        trainer.train()
        results.append(weights(trainer.policy) | weights(trainer.start.labeller))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_warm_up_with_alpha_zero_still_teaches(tmp_path):
    trainer = toy_trainer(tmp_path, warmup_steps=5, max_steps=1)
    before, phi = weights(trainer.policy), weights(trainer.start.labeller)
    trainer.train()
    assert same(weights(trainer.policy), before)
    assert not same(weights(trainer.start.labeller), phi)


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
        phis.append(weights(trainer.start.labeller))
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
        trainer = exact_trainer(
            tmp_path, activation_checkpointing=checkpointing, tuning="lora", max_steps=2
        )
        trainer.train()
        results.append(weights(trainer.policy) | weights(trainer.start.labeller))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-6, atol=1e-9)


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


def test_a_non_finite_pair_stops_the_step_and_is_named(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=1, max_skipped_steps=0)
    broken = trainer.pairs.to_list()
    for row in broken:
        row["ref_chosen_logp"] = float("nan") if row["index"] == 7 else row["ref_chosen_logp"]
    trainer.train_dataset = trainer.pairs = type(trainer.pairs).from_list(broken[:8])
    before, phi = weights(trainer.policy), weights(trainer.start.labeller)
    with pytest.raises(UsageError, match=broken[7]["uid"]):
        trainer.train()
    assert same(weights(trainer.policy), before)
    assert same(weights(trainer.start.labeller), phi)


@pytest.mark.parametrize("where", ["reference", "logits", "gradient", "adapter"])
def test_a_non_finite_step_is_not_taken_nor_logged_and_the_next_one_is(
    tmp_path, monkeypatch, caplog, where
):
    """NaN comes into the second of three steps."""
    trainer = toy_trainer(
        tmp_path, max_steps=3, logging_steps=1, lr_scheduler_type="constant", weight_decay=0.1
    )
    step, seen = type(trainer)._step, []

    def poisoned(self, policy, pairs):
        seen.append((weights(policy), weights(self.start.labeller)))
        if len(seen) != 2:
            return step(self, policy, pairs)
        if where == "reference":
            pairs[0]["ref_rejected_logp"] = float("nan")
            return step(self, policy, pairs)
        if where == "gradient":
            done = step(self, policy, pairs)
            done.update.gradient[0].fill_(float("inf"))
            return done
        if where == "logits":
            head = policy.get_input_embeddings()  # what makes them is NaN from the start
            poison = head.register_forward_hook(lambda *a: a[-1] * float("nan"))
        else:
            parameter = next(p for p in policy.parameters() if p.requires_grad)
            kept = parameter.data.clone()
            parameter.data.flatten()[0] = float("nan")
        try:
            return step(self, policy, pairs)
        finally:
            if where == "logits":
                poison.remove()
            else:
                parameter.data = kept

    monkeypatch.setattr(type(trainer), "_step", poisoned)
    trainer.train()
    assert same(seen[1][0], seen[2][0])
    assert not same(seen[0][0], seen[1][0])
    assert not same(seen[2][0], weights(trainer.policy))
    if where != "gradient":  # found after the meta-learner was taught, by gradients that were whole
        assert same(seen[1][1], seen[2][1])
    lines = [line for line in trainer.state.log_history if "learning_rate" in line]
    assert ["loss" in line for line in lines] == [True, False, True]
    assert "grad_norm" not in lines[1]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 1]
    assert "train_loss" not in trainer.state.log_history[-1]
    assert "The policy was not moved" in caplog.text
    assert ("Look at the pairs" in caplog.text) == (where == "reference")


def test_one_step_too_many_ends_the_run(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=5, max_skipped_steps=2)
    broken = trainer.pairs.to_list()
    for row in broken:
        row["ref_chosen_logp"] = float("inf")
    trainer.train_dataset = trainer.pairs = type(trainer.pairs).from_list(broken)
    with pytest.raises(UsageError, match="max_skipped_steps=2 allows no further such step"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(("tuning", "method"), [("full", "dpo"), ("lora", "dpo"), ("full", "mspo")])
def test_weights_that_a_step_broke_end_the_run_before_they_are_saved(tmp_path, tuning, method):
    class Breaks(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                broken = trainer.start.labeller if method == "mspo" else trainer.policy
                next(p for p in broken.parameters() if p.requires_grad).data[0] = float("inf")

    trainer = toy_trainer(tmp_path, tuning=tuning, method=method, max_steps=3,
                          save_strategy="steps", save_steps=1)  # fmt: skip
    trainer.add_callback(Breaks())
    with pytest.raises(UsageError, match="step 2: what the optimizer made of the weights is not"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


def test_labels_of_every_pair(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.train()
    labels = trainer.label_pairs()
    assert list(labels["uid"]) == list(trainer.pairs["uid"])
    columns = ["uid", "ppl_diff", "soft_label", "p_correct", "evidence", "margin", "step"]
    assert labels.column_names == columns
    assert labels["evidence"] == [None] * len(labels)  # MSPO reads none
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
    passes = []
    read = Scorer.read
    monkeypatch.setattr(Scorer, "read", lambda *a: passes.append(1) or read(*a))
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
    other = tiny_model(dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 0.1
    toy_trainer(tmp_path, model=other)
    assert len(passes) == 3 * count
    toy_trainer(tmp_path, ppl_scope="sequence")
    assert len(passes) == 4 * count
    toy_trainer(tmp_path, bf16=True)
    assert len(passes) == 5 * count


@pytest.mark.parametrize("lookahead_lr", [None, 0.3])
def test_a_step_is_mspo_step_called_by_hand(lookahead_lr, tmp_path):
    """Two steps of the trainer against the algorithm, with α and draws by hand."""
    options = {"lookahead_lr": lookahead_lr, "max_steps": 2,
               "warmup_steps": 0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
               "meta_batch_size": 8, "per_device_train_batch_size": 8, "meta_lr": 1e-3,
               "gradient_accumulation_steps": 1, "learning_rate": 0.05}  # fmt: skip
    trainer, ours = (exact_trainer(tmp_path, **options) for _ in range(2))
    trainer.train()
    policy, meta_learner = ours.policy, ours.start.labeller
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05, weight_decay=0.0)
    meta_optimizer = torch.optim.AdamW(meta_learner.parameters(), lr=1e-3, weight_decay=0.0)
    sampler = CleanSampler(len(ours.clean), 8, seed=42)
    index = trainer.history.tensors()["index"].tolist()
    for step in range(2):
        noisy = make_batch(ours.pairs.select(index[8 * step : 8 * step + 8]).to_list())
        clean = make_batch(ours.clean.select(sampler.draw()).to_list())
        moved, _ = mspo_step(
            policy, meta_learner, meta_optimizer, [kept(policy, noisy, "response")],
            [clean], Objective(GEOMETRIC, 0.1), lookahead_lr or 0.05,
        )  # fmt: skip
        for parameter, gradient in zip(policy.parameters(), moved.gradient, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for one, other in ((trainer.policy, policy), (trainer.start.labeller, meta_learner)):
        flat, expected = (torch.cat([p.flatten() for p in m.parameters()]) for m in (one, other))
        assert (flat - expected).norm() < 1e-9 * expected.norm()


def test_evaluation_numbers(tmp_path):
    pairs = toy_pairs(6, 2)
    trainer = toy_trainer(tmp_path, evaluation=pairs, max_steps=1, warmup_steps=0)
    trainer.train()
    metrics = trainer.evaluate()
    rows = trainer.start.sets.evaluation["eval"].to_list()
    with torch.no_grad():
        measured = measure(trainer.policy.eval(), make_batch(rows), "response")
    margin = measured.margin
    expected = {
        "eval_loss": -torch.nn.functional.logsigmoid(0.1 * margin).mean(),
        "eval_rewards/accuracies": (margin > 0).float().mean(),
        "eval_rewards/margins": 0.1 * margin.mean(),
        "eval_rewards/chosen": 0.1 * measured.chosen_logratio.mean(),
        "eval_logps/rejected": measured.rejected_logp.mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


def test_clean_pairs_are_taken_out_of_training_in_either_order(tmp_path):
    pairs, clean = toy_pairs(24), toy_pairs(24).select(range(12)).to_list()
    for row in clean[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    trainer = toy_trainer(tmp_path, train=pairs, clean=Dataset.from_list(clean))
    assert len(trainer.pairs) == 12
    assert trainer.start.sets.record["train"]["also_clean"] == 12
    assert set(trainer.pairs["prompt"]).isdisjoint(row["prompt"] for row in clean)


def test_evaluation_pairs_that_are_training_pairs_too_are_counted(tmp_path, caplog):
    """In either order: what is measured on them tells nothing of new pairs."""
    pairs, known = toy_pairs(24), toy_pairs(24).select(range(5)).to_list()
    known[0]["chosen"], known[0]["rejected"] = known[0]["rejected"], known[0]["chosen"]
    evaluation = Dataset.from_list(known + toy_pairs(3, seed=9).to_list())
    evaluation = {"mixed": evaluation, "new": toy_pairs(4, seed=8)}
    trainer = toy_trainer(tmp_path, train=pairs, evaluation=evaluation)
    record = trainer.start.sets.record
    counts = {name: of["also_training"] for name, of in record.items() if "also_training" in of}
    assert counts == {"eval_mixed": 5, "eval_new": 0}
    warned = [line for line in caplog.messages if "are training pairs too" in line]
    assert len(warned) == 1
    assert warned[0].startswith("warning: 5 of 8 evaluation pairs of ")


def test_a_given_noise_rate_is_the_prior(tmp_path):
    pairs, labels = toy_pairs(40, flip_every=3), []
    for noise_rate in (0.05, 0.45):
        trainer = toy_trainer(tmp_path, train=pairs, noise_rate=noise_rate)
        assert trainer.start.noise == NoiseRate.given(noise_rate)
        with torch.no_grad():
            labels.append(trainer.start.labeller(torch.tensor(trainer.clean["starting_ppl_diff"])))
    assert labels[0].mean() > labels[1].mean()


def test_lora_dropout_is_off_and_16_bit_weights_are_not_fully_tuned(tmp_path):
    adapter = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    policy, config = tiny_model(dtype=torch.float32, attention="sdpa"), toy_config
    trainer = MSPOTrainer(
        policy, config(tmp_path, tuning="lora"), toy_pairs(16), toy_pairs(12, 1),
        processing_class=make_tokenizer(), peft_config=adapter,
    )  # fmt: skip
    assert not any(m.p for m in trainer.policy.modules() if isinstance(m, torch.nn.Dropout))
    with pytest.raises(UsageError, match="float32"):
        toy_trainer(tmp_path, model=tiny_model(dtype=torch.bfloat16, attention="sdpa"))
    frozen = with_lora(tiny_model(dtype=torch.float32, attention="sdpa")).requires_grad_(False)
    with pytest.raises(UsageError, match="is_trainable=True"):
        toy_trainer(tmp_path, model=frozen, tuning="lora")


def test_a_model_without_finite_log_probs_is_named_and_not_cached(tmp_path):
    model = tiny_model(dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        model.lm_head.weight[5] = 3e38  # finite itself
    with pytest.raises(UsageError, match="not finite"):
        toy_trainer(tmp_path, model=model)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_non_finite_clean_pair_is_named(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=1, meta_batch_size=16, max_skipped_steps=0)
    rows = trainer.clean.to_list()
    rows[3]["ref_chosen_logp"] = float("nan")
    trainer.clean = trainer.teacher._clean = Dataset.from_list(rows)
    phi = weights(trainer.start.labeller)
    with pytest.raises(UsageError, match=rows[3]["uid"]):
        trainer.train()
    assert same(weights(trainer.start.labeller), phi)


@pytest.mark.parametrize(("recipe", "batch", "every"), [("recommended", 8, 4), ("faithful", 64, 1)])
def test_how_much_is_taught_by_default(recipe, batch, every, tmp_path):
    args = toy_config(tmp_path, recipe=recipe, meta_batch_size=None, meta_every=None)
    assert (args.meta_batch_size, args.meta_every) == (batch, every)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_interrupted_and_resumed_is_uninterrupted(tuning, tmp_path):
    options = {"tuning": tuning, "save_strategy": "steps", "save_steps": 2, "meta_every": 2,
               "num_train_epochs": 2}  # fmt: skip
    whole = toy_trainer(tmp_path / "a", **options)
    whole.train()
    stopped = toy_trainer(tmp_path / "b", **options)
    stopped.add_callback(StopAfter(5))
    stopped.train()
    resumed = toy_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert same(weights(resumed.policy), weights(whole.policy))
    assert same(weights(resumed.start.labeller), weights(whole.start.labeller))
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
    other = tiny_model(dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 0.1
    for change, named in (
        ({"beta": 0.2}, "beta"),
        ({"clean": toy_pairs(16, 5)}, "clean pairs"),
        ({"train": toy_pairs(41)}, "training pairs"),
        ({"model": other}, "starting policy"),
        ({"meta_hidden": 64}, "meta_hidden"),
        ({"learning_rate": 2e-3}, "learning_rate"),
    ):
        with pytest.raises(UsageError, match=named):
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
        ({"beta": 0.0}, "beta"),
        ({"beta": -1.0}, "beta"),
        ({"beta": float("inf")}, "beta=inf: must be a finite number"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"meta_lr": float("inf")}, "meta_lr=inf"),
        ({"lookahead_lr": float("nan")}, "lookahead_lr=nan"),
        ({"keep_budget_gib": float("nan")}, "keep_budget_gib=nan"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        ({"learning_rate": 1e38}, r"learning_rate=1e\+38: must be at most"),
        ({"beta": 1e38}, r"beta=1e\+38: must be at most"),
        ({"meta_lr": 1e38}, r"meta_lr=1e\+38: must be at most"),
        ({"lookahead_lr": 1e38}, r"lookahead_lr=1e\+38: must be at most"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"meta_batch_size": 0}, "meta_batch_size"),
        ({"max_length": 1}, "max_length"),
        ({"noise_rate": 0.5}, "noise_rate"),
        ({"method": "dpo", "meta_lr": 1e-3}, "dpo does not read it"),
        ({"method": "dpo", "noise_rate": 0.1}, "dpo does not read it"),
        ({"method": "ppo"}, 'method="ppo"'),
        ({"recipe": "best"}, 'recipe="best"'),
        ({"fp16": True}, "bf16"),
        ({"ppl_scope": "respnse"}, 'ppl_scope="respnse"'),
        ({"engine": "pair"}, 'engine="pair"'),
        ({"tuning": "Lora"}, 'tuning="Lora"'),
        ({"lora_r": 0}, "lora_r=0"),
        ({"lora_r": 8, "tuning": "full"}, "does not read lora"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps"}, "load_best_model_at_end"),
        ({"engine": "double_backward", "activation_checkpointing": True}, 'engine="auto"'),
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
    with pytest.raises(UsageError, match="eval_dataset"):
        toy_trainer(tmp_path, evaluation=toy_pairs(16, 1))
    policy, config = tiny_model(dtype=torch.float32), toy_config(tmp_path)
    with pytest.raises(UsageError, match="by clean_dataset, or clean_dataset=N to hold"):
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
    assert recommended.teaching(100).learning_rate > recommended.teaching(100_000).learning_rate
    overridden = MSPOConfig(output_dir=str(tmp_path), use_cpu=True, learning_rate=3e-6)
    assert overridden.learning_rate == 3e-6


def test_the_z_score_is_the_starting_policys(tmp_path):
    trainer = toy_trainer(tmp_path, warm_start=False)
    start = torch.tensor(trainer.pairs["starting_ppl_diff"])
    assert isinstance(trainer.start.labeller, MetaLearner)
    torch.testing.assert_close(trainer.start.labeller.mean, start.mean().float()[None])
    torch.testing.assert_close(trainer.start.labeller.deviation, start.std().float()[None])
    trainer.train()
    torch.testing.assert_close(trainer.start.labeller.mean, start.mean().float()[None])
    running = toy_trainer(tmp_path, zscore="running")
    running.train()
    assert not torch.allclose(running.start.labeller.mean, start.mean().float()[None])


def test_without_a_meta_learner_p_correct_is_the_starting_policys(tmp_path):
    trainer = toy_trainer(tmp_path, method="dpo", learning_rate=0.05, warmup_steps=0)
    before = trainer.label_pairs()
    trainer.train()
    after = trainer.label_pairs()
    assert list(after["p_correct"]) == list(before["p_correct"])
    assert list(after["ppl_diff"]) != list(before["ppl_diff"])


def test_scoring_runs_in_the_precision_of_training(tmp_path):
    full, mixed = (toy_trainer(tmp_path, bf16=bf16, tuning="lora").pairs for bf16 in (False, True))
    assert list(full["ref_chosen_logp"]) != list(mixed["ref_chosen_logp"])


def test_a_list_of_rows_is_a_data_set(tmp_path):
    rows = toy_pairs(20).to_list()
    del rows[0]["is_flipped"]
    with pytest.raises(UsageError, match="train_dataset, row 2: .*is_flipped"):
        toy_trainer(tmp_path, method="dpo", train=rows)
    rows = toy_pairs(20).to_list()
    trainer = toy_trainer(tmp_path, method="dpo", train=rows, evaluation=toy_pairs(6, 2).to_list())
    as_set = toy_trainer(tmp_path, method="dpo", train=toy_pairs(20))
    assert trainer.pairs.to_list() == as_set.pairs.to_list()
    assert "is_flipped" in trainer.pairs.column_names
    assert len(trainer.start.sets.evaluation["eval"]) == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            DatasetDict(train=toy_pairs(3), test=toy_pairs(3)),
            "train_dataset is a DatasetDict with the splits train, test: give one, such as "
            r"train_dataset\['train'\]",
        ),
        (toy_pairs(3).to_iterable_dataset(), "is an IterableDataset, .*from_list"),
        (None, "train_dataset is missing: give a datasets.Dataset"),
        (3.5, "train_dataset is of type float: give a datasets.Dataset"),
        ([1], "train_dataset, row 1: "),
        ([toy_pairs(2)], "is a list of data sets: give datasets.concatenate_datasets"),
        ([], "train_dataset holds no rows"),
        ({}, "is of type dict: give"),
        ({"prompt": ["a"], "chosen": ["b"]}, "is a dict of columns: give .*from_dict"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user"}]}], "train_dataset, row 1: "),
        (toy_pairs(3).to_pandas().drop(columns="chosen"), "train_dataset, row 1: .*chosen"),
        (pd.DataFrame({"prompt": ["a", 1]}), "train_dataset: its columns make no data set"),
        ("no/where.jsonl", "no/where.jsonl does not exist"),
    ],
)
def test_what_is_no_data_set_is_named_with_what_to_give(tmp_path, given, message):
    options = MSPOConfig(output_dir=str(tmp_path), method="dpo", use_cpu=True)
    with pytest.raises(UsageError, match=message):
        MSPOTrainer(tiny_model(), options, given, processing_class=make_tokenizer())


def test_the_other_two_sets_are_named_by_their_arguments(tmp_path):
    splits = DatasetDict(train=toy_pairs(3))
    with pytest.raises(UsageError, match="clean_dataset is a DatasetDict"):
        toy_trainer(tmp_path, clean=splits)
    with pytest.raises(UsageError, match=r"eval_dataset\['a'\] is of type int"):
        toy_trainer(tmp_path, evaluation={"a": 3})
    with pytest.raises(UsageError, match="eval_dataset is an empty dict: leave it out"):
        toy_trainer(tmp_path, evaluation={})


def test_padding_beyond_the_embedding_is_refused_where_all_weights_are_saved(tmp_path):
    tokenizer = make_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new>"})

    def make(**options):
        options = toy_config(tmp_path, method="dpo", max_steps=1, **options)
        model = tiny_model(dtype=torch.float32, attention="sdpa", vocab_size=rows)
        return MSPOTrainer(model, options, toy_pairs(8), processing_class=tokenizer)

    with pytest.raises(UsageError, match="the padding token '<new>' has the id"):
        make()
    make(tuning="lora").train()
