"""PerpCorrect's rounds: which pairs a surrogate is trained on, and which labels come of them."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from softpref.data import make_batch
from softpref.data.column_cache import ColumnCache
from softpref.errors import UsageError
from softpref.models.scoring import Scorer
from softpref.training.config import MSPOConfig
from softpref.training.finished import model_card, run_record
from softpref.training.perpcorrect.rounds import ROUNDS, Correction, Round, correct, extremes
from softpref.training.perpcorrect.surrogates import Surrogates
from softpref.training.perpcorrect.two_gaussians import TwoGaussians
from softpref.training.step import StepRunner
from softpref.training.trainer import MSPOTrainer
from softpref.world.language import make_tokenizer
from tests.tiny import dpo_gradient, tiny_model
from tests.toy import exact_trainer, toy_config, toy_pairs, toy_trainer

OFFICIAL = {"method": "perpcorrect", "perpcorrect_mode": "official"}
PAIRS = 100  # 2% are two pairs


def official(output, **options):
    defaults = {"train": toy_pairs(PAIRS, flip_every=3), "learning_rate": 1e-2, "max_steps": 2}
    return toy_trainer(output, **(OFFICIAL | defaults | options))


def weights(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


@pytest.fixture
def trained_on(monkeypatch):
    """The pairs that each surrogate was trained on."""
    seen = []
    train = Surrogates._train

    def spy(self, surrogate, pairs, *rest):
        seen.append(pairs)
        train(self, surrogate, pairs, *rest)

    monkeypatch.setattr(Surrogates, "_train", spy)
    return seen


def planned(monkeypatch, scores):
    """Let the surrogates say `scores`; returns what each round asks for."""
    asked = []

    def ppl_diff(self, number, believed, doubted):
        asked.append((number, believed, doubted))
        return scores[number]

    monkeypatch.setattr(Surrogates, "ppl_diff", ppl_diff)
    return asked


def drawn(separation, share_right=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sign = torch.where(torch.rand(PAIRS, generator=generator) < share_right, -1.0, 1.0)
    return 0.1 * (torch.randn(PAIRS, generator=generator) + separation * sign)


def test_the_extremes_are_the_lowest_and_the_highest():
    ppl_diff = torch.tensor([0.3, -0.7, 0.9, -0.1, 0.0, -0.5, 0.4, 0.8])
    assert extremes(ppl_diff, 5, 0.6) == ([1, 5, 3], [7, 2])
    assert extremes(ppl_diff, 4, 0.5) == ([1, 5], [7, 2])
    assert extremes(ppl_diff, 3, 1.0) == ([1, 5, 3], [])
    assert extremes(ppl_diff, 0, 0.6) == ([], [])


def test_every_round_takes_two_percent_more_by_what_the_last_one_said(monkeypatch, tmp_path):
    scores = [drawn(separation, seed=i) for i, separation in enumerate((0.5, 1, 1.5, 3, 2, 1))]
    asked = planned(monkeypatch, scores)
    trainer = official(tmp_path)
    fits = [TwoGaussians.fit(said) for said in scores]
    assert [number for number, _, _ in asked] == list(range(ROUNDS)) == [0, 1, 2, 3, 4, 5]
    assert asked[0][1:] == ([], [])
    for number in range(1, ROUNDS):
        _, believed, doubted = asked[number]
        order = sorted(range(PAIRS), key=lambda i: float(scores[number - 1][i]))
        low = round(2 * number * fits[number - 1].share_right)
        assert believed == order[:low]
        assert doubted == order[PAIRS - (2 * number - low) :]
        assert len(believed) + len(doubted) == 2 * number
    assert any(doubted for _, _, doubted in asked)
    correction = trainer.start.correction
    assert correction.kept == 3
    assert [each.fit for each in correction.rounds] == fits
    assert [(each.believed, each.reversed) for each in correction.rounds] == [
        (len(believed), len(doubted)) for _, believed, doubted in asked
    ]
    expected = [0.0 if x > fits[3].threshold else 1.0 for x in scores[3].tolist()]
    assert list(trainer.pairs["given_label"]) == correction.labels.tolist() == expected
    assert 0 < sum(expected) < PAIRS
    assert trainer.start.noise.rate == trainer.start.noise.expected == correction.noise_rate
    assert correction.noise_rate == 1 - fits[3].share_right


def test_surrogates_see_no_ties_and_the_run_has_them(trained_on, tmp_path):
    train = toy_pairs(PAIRS, flip_every=3)
    trainer = official(tmp_path, train=train.add_column("label", ["tie", "A"] * (PAIRS // 2)))
    tied = {pair["uid"] for pair in trainer.pairs if pair["label"] == "tie"}
    assert len(tied) == PAIRS // 2
    clean = len(trainer.clean)
    seen = [pair for pairs in trained_on[1:] for pair in pairs[clean:]]
    assert seen
    assert not tied & {pair["uid"] for pair in seen}
    assert {pair.get("given_label") for pair in seen} <= {None, 0.0}
    given = dict(zip(trainer.pairs["uid"], trainer.pairs["given_label"], strict=True))
    assert {given[uid] for uid in tied} == {0.5}


def test_of_equal_rounds_the_first_is_kept(monkeypatch, tmp_path):
    planned(monkeypatch, [drawn(1), *[drawn(3)] * 5])
    assert official(tmp_path).start.correction.kept == 1


def test_surrogates_see_clean_pairs_low_ones_as_given_and_high_ones_reversed(trained_on, tmp_path):
    scores = []
    ppl_diff = Surrogates.ppl_diff

    def spy(self, *rest):
        scores.append(ppl_diff(self, *rest))
        return scores[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Surrogates, "ppl_diff", spy)
        trainer = official(tmp_path)
    clean = [pair["uid"] for pair in trainer.clean]
    by_uid = {pair["uid"]: pair for pair in trainer.pairs.remove_columns("given_label")}
    assert [pair["uid"] for pair in trained_on[0]] == clean
    assert not any("given_label" in pair for pair in trained_on[0])
    reversed_in_all = 0
    for number, pairs in enumerate(trained_on[1:], start=1):
        assert [pair["uid"] for pair in pairs[: len(clean)]] == clean
        more = pairs[len(clean) :]
        assert len(more) == 2 * number
        ppl = dict(zip(trainer.pairs["uid"], scores[number - 1].tolist(), strict=True))
        as_given = [ppl[pair["uid"]] for pair in more if "given_label" not in pair]
        reversed_ = [ppl[pair["uid"]] for pair in more if "given_label" in pair]
        assert as_given == sorted(ppl.values())[: len(as_given)]
        assert reversed_ == sorted(ppl.values())[PAIRS - len(reversed_) :]
        for pair in more:
            assert pair.pop("given_label", 0.0) == 0.0
            assert pair == by_uid[pair["uid"]]
        reversed_in_all += len(reversed_)
    assert reversed_in_all


def surrogates_of(trainer, args, adapter=None):
    cache = ColumnCache(args.reference_cache)
    return Surrogates(trainer.policy, trainer.start.sets, args, adapter, "", cache)


def surrogate_after(output, rows, make=exact_trainer, **options):
    """A surrogate trained on rows, the first clean pairs with other labels or texts, say."""
    trainer = make(output, method="dpo", **options)
    args = toy_config(output, **OFFICIAL, **options)
    surrogates = surrogates_of(trainer, args)
    surrogate, collate = surrogates._fresh()
    surrogates._train(surrogate, rows(trainer.clean.to_list()), collate, "")
    return trainer, surrogate, collate


def swapped(pair):
    return pair | {
        "chosen_ids": pair["rejected_ids"],
        "rejected_ids": pair["chosen_ids"],
        "ref_chosen_logp": pair["ref_rejected_logp"],
        "ref_rejected_logp": pair["ref_chosen_logp"],
    }


def test_a_reversed_pair_is_the_pair_swapped(tmp_path):
    def half(turn):
        return lambda rows: [*rows[:8], *map(turn, rows[8:])]

    ends = []
    for turn in (lambda pair: pair | {"given_label": 0.0}, swapped, lambda pair: pair):
        _, surrogate, _ = surrogate_after(tmp_path, half(turn))
        ends.append(torch.cat([p.detach().flatten() for p in surrogate.parameters()]))
    assert (ends[0] - ends[1]).norm() < 1e-9 * ends[1].norm()
    assert (ends[0] - ends[2]).norm() > 1e-2 * ends[2].norm()


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_surrogate_learns_what_its_pairs_say(tuning, bf16, tmp_path):
    options = {"tuning": tuning, "bf16": bf16, "learning_rate": 2e-2}
    trainer, surrogate, collate = surrogate_after(
        tmp_path, lambda rows: rows, make=toy_trainer, **options
    )
    scored = Scorer(surrogate, collate, "sequence", bf16=bf16).measure(trainer.clean, "")
    assert scored.margin.mean() > 1
    assert "forward" not in vars(surrogate)


def test_a_surrogates_steps_by_hand(tmp_path):
    """AdamW without decay, a rate that falls in a line, gradients clipped at the run's norm."""
    options = {"learning_rate": 3e-3, "max_grad_norm": 0.1, "per_device_train_batch_size": 8}
    trainer, surrogate, _ = surrogate_after(tmp_path, lambda rows: rows, **options)
    rows, policy = trainer.clean.to_list(), trainer.policy
    assert len(rows) == 16  # one step an epoch: 8 pairs in each of 2 micro-batches
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    for rate in (3e-3, 2e-3, 1e-3):
        for parameter, gradient in zip(
            policy.parameters(), dpo_gradient(policy, [make_batch(rows)], 0.1)[1], strict=True
        ):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.1)
        assert norm > 0.1
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    ends = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (surrogate, policy)]
    assert (ends[0] - ends[1]).norm() < 1e-9 * ends[1].norm()


def test_a_surrogate_starts_the_same_at_any_time_and_has_no_dropout(tmp_path):
    trainer = toy_trainer(tmp_path, method="dpo")
    args = toy_config(tmp_path, **OFFICIAL, tuning="lora")
    adapter = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    surrogates = surrogates_of(trainer, args, adapter)
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        starts.append(surrogates._fresh()[0])
    assert same(*map(weights, starts))
    assert not any(m.p for m in starts[0].modules() if isinstance(m, torch.nn.Dropout))


def test_a_surrogate_has_three_epochs_in_batches_of_the_run(monkeypatch, tmp_path):
    seen = []
    plain = StepRunner.plain
    monkeypatch.setattr(
        StepRunner,
        "plain",
        lambda self, policy, pairs: seen.append(pairs) or plain(self, policy, pairs),
    )
    surrogate_after(tmp_path, lambda rows: rows[:13])
    assert [len(pairs) for pairs in seen] == [8, 5] * 3
    epochs = [[pair["uid"] for pairs in seen[i : i + 2] for pair in pairs] for i in (0, 2, 4)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_policy_is_left_as_it_was(tuning, tmp_path):
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    args = toy_config(tmp_path, **OFFICIAL, tuning=tuning, learning_rate=1e-2)
    policy = tiny_model(dtype=torch.float32, attention="sdpa")
    plain = toy_trainer(tmp_path, method="dpo", model=policy, train=toy_pairs(PAIRS, 0, 3))
    before, config = weights(policy), str(policy.config)
    trains = [(name, p.requires_grad, p.grad) for name, p in policy.named_parameters()]
    modes = [(name, type(m), m.training) for name, m in policy.named_modules()]
    adapter_before, random = adapter.to_dict(), torch.get_rng_state()
    trained, cache = (adapter if tuning == "lora" else None), ColumnCache(args.reference_cache)
    found = correct(Surrogates(policy, plain.start.sets, args, trained, "", cache))
    assert found is not None
    assert same(weights(policy), before)
    assert str(policy.config) == config
    assert [(name, p.requires_grad, p.grad) for name, p in policy.named_parameters()] == trains
    assert [(name, type(m), m.training) for name, m in policy.named_modules()] == modes
    assert adapter.to_dict() == adapter_before
    assert torch.equal(torch.get_rng_state(), random)


def test_the_runs_own_adapter_is_that_of_any_method(tmp_path):
    one = official(tmp_path, tuning="lora")
    other = toy_trainer(tmp_path, method="dpo", tuning="lora", train=toy_pairs(PAIRS, flip_every=3))
    assert same(weights(one.policy), weights(other.policy))


def test_one_surrogate_at_a_time_is_held(monkeypatch, tmp_path):
    alive, most = [], []
    fresh = Surrogates._fresh

    def spy(self):
        most.append(sum(each() is not None for each in alive))
        surrogate, collate = fresh(self)
        alive.append(weakref.ref(surrogate))
        return surrogate, collate

    monkeypatch.setattr(Surrogates, "_fresh", spy)
    official(tmp_path, tuning="lora", bf16=True)
    assert len(alive) == ROUNDS
    assert max(most) == 0


def test_the_same_run_comes_to_the_same_labels_and_is_not_made_twice(trained_on, tmp_path):
    one = official(tmp_path / "a").start.correction
    assert len(trained_on) == ROUNDS
    other = official(tmp_path / "b").start.correction
    assert len(trained_on) == 2 * ROUNDS
    again = official(tmp_path / "a").start.correction
    assert len(trained_on) == 2 * ROUNDS
    for correction in (other, again):
        assert torch.equal(correction.labels, one.labels)
        assert correction.rounds == one.rounds
    first = sorted((tmp_path / "a" / "cache").glob("perpcorrect-*-0.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:20])
    assert official(tmp_path / "a").start.correction.rounds == one.rounds
    assert len(trained_on) == 2 * ROUNDS + 1


def test_what_is_kept_belongs_to_all_that_it_follows_from(tmp_path):
    trainer = toy_trainer(tmp_path, method="dpo")
    prepared, adapters = (
        trainer.start.sets,
        [LoraConfig(target_modules=["a", "b"], r=r) for r in (2, 3)],
    )

    def path(prepared=prepared, adapter=None, fingerprint="", **options):
        args = toy_config(tmp_path, **(OFFICIAL | options))
        return Surrogates(
            trainer.policy, prepared, args, adapter, fingerprint, ColumnCache(None)
        )._kept_as

    fewer = [
        dataclasses.replace(prepared, **{name: getattr(prepared, name).select(range(12))})
        for name in ("train", "clean")
    ]
    changes = ({}, {"seed": 1}, {"learning_rate": 2e-2}, {"tuning": "lora"}, {"beta": 0.3},
               {"bf16": True}, {"gradient_accumulation_steps": 1}, {"max_grad_norm": 0.5},
               {"per_device_train_batch_size": 2}, {"tuning": "lora", "lora_r": 4},
               {"tuning": "lora", "lora_alpha": 4}, {"fingerprint": "other"},
               {"tuning": "lora", "lora_target_modules": ["q_proj"]}, {"prepared": fewer[0]},
               {"prepared": fewer[1]}, {"adapter": adapters[0]},
               {"adapter": adapters[1]})  # fmt: skip
    assert len({path(**change) for change in changes}) == len(changes)
    assert path(max_steps=3, logging_steps=5, ppl_scope="response") == path()


class StopAfterTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


def test_a_resumed_run_has_the_labels_of_the_interrupted_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = official(tmp_path / "a", **options)
    whole.train()
    stopped = official(tmp_path / "b", **options)
    stopped.add_callback(StopAfterTwo())
    stopped.train()
    resumed = official(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 4
    assert same(weights(resumed.policy), weights(whole.policy))
    assert same(resumed.history.tensors(), whole.history.tensors())
    with pytest.raises(UsageError, match="perpcorrect_mode was 'official' and is 'threshold'"):
        official(tmp_path / "b", **(options | {"perpcorrect_mode": "threshold"})).train(
            resume_from_checkpoint=True
        )


def test_the_policy_follows_the_labels_found(tmp_path):
    trainer = official(tmp_path)
    trainer.train()
    history = trainer.history.tensors()
    expected = trainer.start.correction.labels[history["index"]]
    assert torch.equal(history["soft_label"], expected)
    assert {0.0, 1.0} == set(trainer.start.correction.labels.tolist())
    labels = trainer.label_pairs()
    assert set(labels["soft_label"]) == {None}
    assert all(0 <= p <= 1 for p in labels["p_correct"])


def test_the_truth_is_not_read(tmp_path):
    pairs = toy_pairs(PAIRS, flip_every=3)
    lies = pairs.remove_columns("is_flipped").add_column("is_flipped", [True, False] * 50)
    found = [official(tmp_path / name, train=train).start.correction
             for name, train in (("truth", pairs), ("lies", lies))]  # fmt: skip
    assert found[0].rounds == found[1].rounds
    assert torch.equal(found[0].labels, found[1].labels)


def test_ppl_is_over_prompt_and_response_whatever_else_is_asked_for(tmp_path):
    runs = [official(tmp_path / scope, ppl_scope=scope) for scope in ("response", "sequence")]
    assert runs[0].start.correction.rounds == runs[1].start.correction.rounds
    starts = [list(run.pairs["starting_ppl_diff"]) for run in runs]
    assert starts[0] != starts[1]


def test_the_record_has_all_numbers(tmp_path):
    trainer = official(tmp_path)
    record = run_record(trainer)
    kept = trainer.start.correction.rounds[trainer.start.correction.kept].fit
    found = record["perpcorrect"]
    assert record["options"]["perpcorrect_mode"] == "official"
    assert record["noise_rate_source"] == "perpcorrect's fit"
    assert record["noise_rate"]["rate"] == found["noise_rate"] == 1 - found["alpha"]
    assert found["alpha"] == kept.share_right
    assert found["threshold"] == kept.threshold
    assert found["labels_reversed"] == int((trainer.start.correction.labels == 0).sum())
    assert found["kept_round"] == trainer.start.correction.kept
    assert len(found["rounds"]) == ROUNDS
    assert found["rounds"][found["kept_round"]]["mu"] == kept.mean
    assert found["rounds"][found["kept_round"]]["separation"] == kept.separation
    assert "their repository" in record["source"]
    assert f"| {found['noise_rate']:.1%} (perpcorrect's fit) |" in model_card(record)
    other = run_record(toy_trainer(tmp_path, method="dpo"))
    assert other["perpcorrect"] is None
    assert other["noise_rate_source"] == "estimated"


def test_a_record_without_a_threshold_is_json():
    rounds = (Round(0, 0, TwoGaussians(-1.0, 1.0, 1.0)),)
    record = Correction(rounds, 0, torch.ones(3)).record()
    assert rounds[0].fit.threshold == math.inf
    assert record["threshold"] is None
    json.dumps(record, allow_nan=False)


def test_other_methods_train_no_surrogate(trained_on, tmp_path):
    for options in ({"method": "dpo"}, {"method": "perpcorrect"}):
        trainer = toy_trainer(tmp_path, **options)
        assert trainer.start.correction is None
    assert trainer.args.perpcorrect_mode == "threshold"
    assert trained_on == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "dpo", "perpcorrect_mode": "official"}, "perpcorrect_mode: method dpo does"),
        ({"method": "mspo", "perpcorrect_mode": "threshold"}, "method mspo does not read it"),
        (OFFICIAL | {"noise_rate": 0.2}, "finds its own noise rate: leave noise_rate out"),
        (OFFICIAL | {"perpcorrect_mode": "theirs"}, "choose one of threshold, official"),
        (OFFICIAL | {"meta_lr": 0.1}, "meta_lr"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        toy_config(tmp_path, **options)


def test_threshold_mode_still_takes_a_noise_rate(tmp_path):
    toy_config(tmp_path, method="perpcorrect", perpcorrect_mode="threshold", noise_rate=0.2)


def test_clean_pairs_are_needed_and_own_labels_refused(tmp_path):
    policy, args = (
        tiny_model(dtype=torch.float32, attention="sdpa"),
        toy_config(tmp_path, **OFFICIAL),
    )
    with pytest.raises(UsageError, match="learns from clean pairs"):
        MSPOTrainer(policy, args, toy_pairs(24), processing_class=make_tokenizer())
    with pytest.raises(UsageError, match="choose gdpo or cdpo"):
        official(tmp_path, train=toy_pairs(24).add_column("soft_label", [0.5] * 24))


def test_a_surrogate_that_breaks_is_named_and_not_kept(monkeypatch, tmp_path):
    says = "surrogate of round 0: its loss or the gradient is not finite. Lower learning_rate"
    monkeypatch.setattr("softpref.options.LARGEST_RATE", 1e30)
    with pytest.raises(UsageError, match=says):
        official(tmp_path, learning_rate=1e30)

    def break_it(self, surrogate, *rest):
        surrogate.lm_head.weight.data.fill_(float("nan"))

    monkeypatch.setattr(Surrogates, "_train", break_it)
    with pytest.raises(UsageError, match="surrogate of round 0: its PPLDiff is not finite"):
        official(tmp_path)
    assert not list((tmp_path / "cache").glob("perpcorrect-*"))


def test_ppl_diff_without_spread_is_a_users_error(monkeypatch, tmp_path):
    planned(monkeypatch, [torch.zeros(PAIRS)] * ROUNDS)
    with pytest.raises(UsageError, match="round 0: ppl_diff is the same for every pair"):
        official(tmp_path)


def test_every_round_is_said(caplog, tmp_path):
    with caplog.at_level("INFO", "softpref"):
        official(tmp_path)
    lines = [line for line in caplog.messages if line.startswith("perpcorrect, round")]
    assert len(lines) == ROUNDS
    for line in lines:
        assert all(part in line for part in ("μ ", "σ ", "nats per token", "α ", "separation"))


def test_official_is_refused_in_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(MSPOConfig, "world_size", 2)
    with pytest.raises(UsageError, match='="official" runs in one process'):
        toy_config(tmp_path, **OFFICIAL)
