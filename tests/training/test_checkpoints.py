import contextlib
import inspect
import json
import logging
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from softpref.algorithm.ranks import Ranks
from softpref.errors import UsageError
from softpref.training import checkpoints, seals, states
from softpref.training.checkpoints import SafeCheckpoints, newest_complete
from softpref.training.config import MSPOConfig
from softpref.training.identity import refuse_other_run
from softpref.training.saving import load_weights
from softpref.training.states import state_to_tensors, tensors_to_state, write_state
from tests.safe_files import assert_safe_files

ROWS = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(3, 20, (10, 6), generator=torch.Generator().manual_seed(0)).tolist()
]


class NoisyTrainer(SafeCheckpoints):
    """Draws from every generator, and keeps a state of its own that the loss depends on."""

    method = "mspo"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.count, self.scale = 0, torch.ones(2, 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.count += 1
            self.scale *= 1.01
            noise = 1 + 0.1 * (random.random() + np.random.standard_normal())
            loss = loss * noise * self.scale.mean() / (1 + 0.01 * self.count)
        return (loss, outputs) if return_outputs else loss

    def extra_state(self):
        return {"scale": self.scale}, {"count": self.count}

    def load_extra_state(self, tensors, values):
        self.scale, self.count = tensors["scale"], values["count"]

    def identity(self):
        return {"method": self.method, "betas": (0.1, 0.2)}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def tiny(lora=False, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    if lora:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        torch.manual_seed(seed)
        model = get_peft_model(
            model, LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "down_proj"])
        )
    return model


EXPERTS = {
    "mixtral": {"num_local_experts": 3, "intermediate_size": 8},
    "qwen2_moe": {
        "num_experts": 3,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "intermediate_size": 8,
    },
}


def experts(kind, seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        bos_token_id=1,
        eos_token_id=2,
        **EXPERTS[kind],
    )
    return AutoModelForCausalLM.from_config(config)


def trainer_in(directory, model=None, cls=NoisyTrainer, callbacks=None, eval_rows=None, **changes):
    # Five batches an epoch, two to a step: three steps an epoch, the last of one batch.
    arguments = {
        "output_dir": str(directory),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return cls(
        model=tiny() if model is None else model,
        args=TrainingArguments(**(arguments | changes)),
        train_dataset=ROWS,
        eval_dataset=eval_rows,
        callbacks=callbacks,
    )


def everything(trainer):
    tensors, values = state_to_tensors(
        {"optimizer": trainer.optimizer.state_dict(), "lr": trainer.lr_scheduler.state_dict()}
    )
    own_tensors, own_values = trainer.extra_state()
    return trainer.model.state_dict() | tensors | own_tensors, values | own_values


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    trainer = trainer_in(directory, hub_token="hf_secret")
    trainer.train()
    trainer.save_model()
    return directory


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def steps(directory):
    return sorted(int(path.name[len("checkpoint-") :]) for path in directory.glob("checkpoint-*"))


# --- state dicts ----------------------------------------------------------------------------------


def stepped(make, parameters, count):
    optimizer = make(parameters)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() + p.sin().sum() for p in parameters)
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), amsgrad=True),
        lambda p: torch.optim.AdamW(
            [{"params": p[:1]}, {"params": p[1:], "lr": torch.tensor(0.3), "weight_decay": 0.2}]
        ),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
        lambda p: torch.optim.Adafactor(p),
    ],
)
def test_any_optimizer_goes_on_exactly_from_its_tensors_and_json(make, tmp_path):
    def fresh():
        return [
            torch.linspace(-1, 1, 4).reshape(2, 2).requires_grad_(),
            torch.ones(3, requires_grad=True),
        ]

    whole = fresh()
    optimizer = stepped(make, whole, 3)
    tensors, values = state_to_tensors(optimizer.state_dict())
    if tensors:
        save_file(tensors, tmp_path / "state.safetensors")
        tensors = load_file(tmp_path / "state.safetensors")
    restored = tensors_to_state(tensors, json.loads(json.dumps(values)))

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b) and a.dtype == b.dtype
        if isinstance(a, dict):
            return type(a) is type(b) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list | tuple):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and a == b

    assert same(dict(optimizer.state_dict()), restored)

    halves = [p.detach().clone().requires_grad_() for p in whole]
    resumed = make(halves)
    resumed.load_state_dict(restored)

    def closure(optimizer, parameters):
        optimizer.zero_grad()
        loss = sum((p**2).sum() + p.sin().sum() for p in parameters)
        loss.backward()
        return loss

    optimizer.step(lambda: closure(optimizer, whole))
    resumed.step(lambda: closure(resumed, halves))
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_keys_that_look_like_marks_survive():
    state = {"a": {"$tensor": "x", 3: (1, [None, True, 0.1])}, "b": {"$tuple": [1]}, "c": {}}
    tensors, values = state_to_tensors(state)
    assert tensors_to_state(tensors, json.loads(json.dumps(values))) == state


def test_what_json_cannot_hold_is_named():
    with pytest.raises(TypeError, match=r"state\.0\.hook: a function"):
        state_to_tensors({"state": {0: {"hook": lambda: None}}})
    with pytest.raises(TypeError, match=r"a\.b"):  # two paths that read alike
        state_to_tensors({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("save_steps", "saved", "stop"), [(2, 4, 5), (3, 3, 4)], ids=["mid_epoch", "epoch_end"]
)
def test_resumed_equals_uninterrupted(tmp_path, lora, save_steps, saved, stop):
    length = {"save_steps": save_steps, "max_steps": 7}
    whole = trainer_in(tmp_path / "whole", tiny(lora), **length)
    whole.train()
    generators = torch.get_rng_state(), random.getstate(), np.random.standard_normal()

    cut = trainer_in(tmp_path / "cut", tiny(lora), callbacks=[StopAt(stop)], **length)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert newest_complete(tmp_path / "cut")[0].name == f"checkpoint-{saved}"

    resumed = trainer_in(tmp_path / "cut", tiny(lora, seed=5), **length)
    torch.rand(3), random.random(), np.random.standard_normal()  # must not matter
    result = resumed.train(resume_from_checkpoint=True)

    assert result.global_step == 7
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.standard_normal()) == generators[1:]
    ours, our_values = everything(resumed)
    theirs, their_values = everything(whole)
    assert_same_bits(ours, theirs)
    assert our_values == their_values
    logged = [[entry.get("loss") for entry in t.state.log_history[:-1]] for t in (resumed, whole)]
    assert logged[0] == logged[1]
    last, whole_last = (trainer.state.log_history[-1] for trainer in (resumed, whole))
    assert last["train_loss"] == whole_last["train_loss"]


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_go_on_though_they_are_saved_by_other_names(tmp_path, kind):
    """Published files have experts one by one, and Mixtral other names for the whole block."""
    whole = trainer_in(tmp_path / "whole", experts(kind), max_steps=4)
    whole.train()
    saved = tmp_path / "whole" / "checkpoint-2"
    assert load_file(saved / "model.safetensors").keys() - whole.model.state_dict().keys()

    resumed = trainer_in(tmp_path / "resumed", experts(kind, seed=5), max_steps=4)
    resumed.train(resume_from_checkpoint=str(saved))
    assert_same_bits(everything(resumed)[0], everything(whole)[0])

    resumed.state.best_model_checkpoint = str(saved)
    resumed._load_best_model()
    resumed.save_model(str(tmp_path / "best"))
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert_same_bits(best, load_file(saved / "model.safetensors"))


def test_shards_that_name_weights_otherwise_are_refused(tmp_path):
    model = tiny()
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors["model.norm.gain"] = tensors.pop("model.norm.weight")
    (tmp_path / "shards").mkdir()
    save_file(tensors, tmp_path / "shards" / "model.safetensors")
    with pytest.raises(UsageError, match=r"there is no model\.norm\.weight: .*transformers"):
        load_weights(tmp_path, model)


@pytest.mark.parametrize("steps_in_all", [4, 6], ids=["mid_epoch", "epoch_end"])
def test_a_run_that_stopped_after_its_last_step_takes_no_other(tmp_path, steps_in_all):
    length = {"max_steps": steps_in_all, "lr_scheduler_type": "constant", "save_strategy": "epoch"}
    whole = trainer_in(tmp_path, **length)
    whole.train()
    generators = torch.get_rng_state(), random.getstate()
    before = sorted(path.name for path in tmp_path.iterdir())

    again = trainer_in(tmp_path, tiny(seed=5), eval_rows=ROWS, eval_strategy="epoch", **length)
    torch.rand(3), random.random()
    result = again.train(resume_from_checkpoint=True)

    assert result.global_step == again.state.global_step == steps_in_all
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_same_bits(everything(again)[0], everything(whole)[0])
    assert everything(again)[1] == everything(whole)[1]
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    # But for how long it took.
    *ours, last = again.state.log_history
    *theirs, whole_last = whole.state.log_history
    assert ours == theirs
    assert last.items() <= whole_last.items()
    assert result.training_loss == last["train_loss"] > 0


def test_a_run_may_resume_from_a_named_checkpoint_and_replace_later_ones(run):
    before = (run / "checkpoint-4" / "optimizer.safetensors").read_bytes()
    (run / "checkpoint-4" / "stale.txt").write_text("from before")
    trainer = trainer_in(run, tiny(seed=3))
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert not (run / "checkpoint-4" / "stale.txt").exists()
    assert (run / "checkpoint-4" / "optimizer.safetensors").read_bytes() == before
    assert steps(run) == [2, 4, 6]
    assert not list(run.glob(".partial-*"))


def test_stateful_callbacks_are_recorded_once(tmp_path):
    trainer = trainer_in(
        tmp_path,
        eval_rows=ROWS[:2],
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        callbacks=[EarlyStoppingCallback(50), EarlyStoppingCallback(60)],
    )
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["EarlyStoppingCallback"]
    assert [entry["args"]["early_stopping_patience"] for entry in stored] == [50, 60]
    assert state["stateful_callbacks"]["TrainerControl"]["args"]["should_save"] is True


def test_operations_are_counted_up_to_the_save(tmp_path):
    trainer_in(tmp_path, max_steps=2, logging_strategy="no").train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["total_flos"] > 0


def test_gradient_scaler_goes_through_json(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=7)
    trainer._save_scaler(str(tmp_path))
    saved = trainer.accelerator.scaler.state_dict()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer._load_scaler(str(tmp_path))
    assert trainer.accelerator.scaler.state_dict() == saved
    assert (tmp_path / "scaler.json").exists()


# --- completeness ---------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": (lambda c: truncate(c / "model.safetensors"), "model.safetensors is damaged"),
    "flipped": (lambda c: flip(c / "optimizer.safetensors"), "optimizer.safetensors is damaged"),
    "lost": (lambda c: (c / "rng.json").unlink(), "rng.json is missing"),
    "no_manifest": (lambda c: (c / "manifest.json").unlink(), "no manifest.json"),
    "cut_manifest": (lambda c: truncate(c / "manifest.json"), "manifest.json is damaged"),
    "odd_manifest": (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "pickle": (lambda c: (c / "pytorch_model.bin").touch(), "may be a pickle"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_named(run, damage):
    harm, reason = DAMAGES[damage]
    harm(run / "checkpoint-6")

    found, skipped = newest_complete(run)
    assert found == run / "checkpoint-4"
    assert [path for path, _ in skipped] == [run / "checkpoint-6"]
    assert reason in skipped[0][1]
    with pytest.raises(UsageError, match="checkpoint-6: cannot resume, .*resume_from_checkpoint"):
        trainer_in(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))


def test_training_falls_back_to_the_newest_complete_checkpoint(run, caplog):
    flip(run / "checkpoint-6" / "rng.safetensors")
    begins = []
    note = TrainerCallback()
    note.on_train_begin = lambda _, state, *__, **___: begins.append(state.global_step)
    trainer = trainer_in(run, save_strategy="no", callbacks=[note])
    with caplog.at_level(logging.WARNING, "softpref"):
        trainer.train(resume_from_checkpoint=True)
    assert begins == [4]
    assert "checkpoint-6 is skipped: rng.safetensors is damaged" in caplog.text


def test_every_byte_of_the_manifest_matters_or_is_harmless(run):
    manifest = run / "checkpoint-6" / "manifest.json"
    good = manifest.read_bytes()
    for position in range(0, len(good), 37):
        flipped = bytearray(good)
        flipped[position] ^= 4
        manifest.write_bytes(flipped)
        newest_complete(run)  # whatever it finds, it does not fail


def test_nothing_complete_is_a_usage_error(run, tmp_path):
    with pytest.raises(UsageError, match="no complete checkpoint to resume from. Leave"):
        trainer_in(tmp_path / "empty").train(resume_from_checkpoint=True)
    for step in (2, 4, 6):
        (run / f"checkpoint-{step}" / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"from; checkpoint-6: .*; checkpoint-4: .*-2: .*\. Leave"):
        trainer_in(run).train(resume_from_checkpoint=True)
    with pytest.raises(UsageError, match="it is not a directory"):
        trainer_in(run).train(resume_from_checkpoint=str(run / "checkpoint-5"))
    assert newest_complete(tmp_path / "nowhere") == (None, [])


def test_steps_are_compared_as_numbers_and_strangers_ignored(run):
    (run / "checkpoint-6").rename(run / "checkpoint-10")
    (run / "checkpoint-12-copy").mkdir()
    (run / "checkpoint-99").touch()
    assert newest_complete(run) == (run / "checkpoint-10", [])


def fail_on_call(monkeypatch, target, name, number):
    original, calls = getattr(target, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)


@pytest.mark.parametrize(
    ("target", "name", "number"),
    [
        (states, "save_file", 1),
        (LlamaForCausalLM, "save_pretrained", 1),
        (seals, "seal", 20),
        (os, "fsync", 4),
        (Path, "rename", 1),
    ],
)
def test_a_failed_save_leaves_the_previous_checkpoint_alone(run, monkeypatch, target, name, number):
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    with monkeypatch.context() as patch:
        fail_on_call(patch, target, name, number)
        with pytest.raises(OSError, match="No space left"):
            trainer_in(run, max_steps=4).train(resume_from_checkpoint=True)
    assert steps(run) == [2]
    assert newest_complete(run) == (run / "checkpoint-2", [])
    assert list(run.glob(".partial-*"))

    trainer_in(run, max_steps=4).train(resume_from_checkpoint=True)
    assert newest_complete(run)[0] == run / "checkpoint-4"
    assert not list(run.glob(".partial-*"))


def test_the_name_appears_only_when_every_byte_is_on_disk(tmp_path, monkeypatch):
    synced, original = [], os.fsync

    def fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        original(descriptor)

    rename = Path.rename

    def checked_rename(self, target):
        written = {path for path in self.rglob("*") if path.is_file()} | {self}
        assert written <= set(synced), written - set(synced)
        assert not Path(target).exists()
        synced.clear()
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", checked_rename)
    trainer_in(tmp_path, max_steps=2).train()
    assert synced == [tmp_path]


# --- identity -------------------------------------------------------------------------------------


def test_another_run_is_refused_with_every_difference(run):
    class Changed(NoisyTrainer):
        def identity(self):
            return {"method": "dpo", "betas": (0.1, 0.2), "data": "abc"}

    with pytest.raises(UsageError) as refusal:
        trainer_in(run, cls=Changed).train(resume_from_checkpoint=True)
    message = str(refusal.value)
    assert "checkpoint-6" in message
    assert "method was 'mspo' and is 'dpo'" in message
    assert "data was None and is 'abc'" in message
    assert "betas" not in message
    assert "output_dir" in message


@pytest.mark.parametrize(
    ("options", "newer", "says"),
    [
        ({}, {"load_in_4bit": False, "max_length": 1024, "seed": 42, "signals": ["ppl_diff"]}, ""),
        ({"method": "dpo"}, {"signals": None}, ""),
        ({"recipe": "faithful"}, {"tuning": "full", "meta_every": 1, "warm_start": False}, ""),
        ({"recipe": "faithful"}, {"warm_start": True}, "warm_start was False and is True"),
        ({}, {"load_in_4bit": True}, "load_in_4bit was False and is True"),
        ({}, {"data": "abc"}, "data was None and is 'abc'"),  # not an option
        ({}, {"tuning": "full"}, "tuning was 'lora' and is 'full'"),
    ],
)
def test_what_a_checkpoint_is_too_old_to_name_counts_as_left_open(tmp_path, options, newer, says):
    args = MSPOConfig(str(tmp_path), use_cpu=True, **options)
    write_state(tmp_path, "identity", {}, {"beta": 0.1})
    refused = pytest.raises(UsageError, match=says) if says else contextlib.nullcontext()
    with refused:
        refuse_other_run(tmp_path, {"beta": 0.1} | newer, args)


# --- rotation, best model, model only -------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "left"), [(1, [6]), (2, [4, 6]), (5, [2, 4, 6]), (None, [2, 4, 6])]
)
def test_rotation_keeps_the_newest(tmp_path, limit, left):
    trainer_in(tmp_path, save_total_limit=limit).train()
    assert steps(tmp_path) == left


def test_rotation_never_deletes_the_last_complete_one(run):
    for step in (4, 6):
        flip(run / f"checkpoint-{step}" / "model.safetensors")
    # From now on numbers mislead: the one just written has a lower step than damaged ones.
    trainer_in(run, max_steps=3, save_steps=3, save_total_limit=1).train(
        resume_from_checkpoint=True
    )
    assert steps(run) == [3]
    assert newest_complete(run)[0] == run / "checkpoint-3"


# The highest loss, so that the best step is not the last one.
BEST = {
    "eval_rows": ROWS[:4],
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
    "learning_rate": 0.3,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_model_is_kept_and_loaded(tmp_path, lora, limit):
    trainer = trainer_in(tmp_path, tiny(lora), **BEST, save_total_limit=limit)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_global_step < 6, "the last step must not be the best"
    assert steps(tmp_path) == ([trainer.state.best_global_step] if limit else [2, 4, 6])
    saved = load_file(next(best.glob("*model.safetensors")))
    trainer.save_model()
    assert_same_bits(load_file(next(tmp_path.glob("*model.safetensors"))), saved)


def test_the_best_checkpoint_records_itself(tmp_path):
    trainer_in(tmp_path, **BEST).train()
    for step in steps(tmp_path):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        expected = tmp_path / f"checkpoint-{state['best_global_step']}"
        assert state["best_model_checkpoint"] == str(expected)


def test_a_damaged_best_model_is_never_loaded(tmp_path):
    class Harm(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                flip(Path(state.best_model_checkpoint) / "model.safetensors")

    with pytest.raises(UsageError, match=r"best model cannot be loaded, model\.safetensors is dam"):
        trainer_in(tmp_path, callbacks=[Harm()], **BEST).train()


def test_save_only_model_saves_only_the_model(tmp_path):
    trainer_in(tmp_path, save_only_model=True).train()
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert "model.safetensors" in names
    assert not {
        name for name in names if name.startswith(("optimizer", "scheduler", "rng", "extra"))
    }
    with pytest.raises(UsageError, match="save_only_model=True"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")


# --- no pickles -----------------------------------------------------------------------------------


def test_a_run_leaves_no_pickle(finished, tmp_path):
    assert_safe_files(finished)
    trainer = trainer_in(tmp_path, tiny(lora=True), max_steps=2)
    trainer.train()
    trainer.save_model()
    assert_safe_files(tmp_path)
    assert (tmp_path / "training_args.json").exists()
    assert json.loads((finished / "training_args.json").read_text())["learning_rate"] == 1e-2


def test_a_run_leaves_no_secret(finished):
    for path in finished.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path


def test_the_source_has_no_pickle():
    source = inspect.getsource(checkpoints)
    for word in ("torch.load", "torch.save", "import pickle", "weights_only"):
        assert word not in source


# --- what of transformers is overridden -----------------------------------------------------------

HOOKS = {
    "init_hf_repo": "token, private",
    "train": "resume_from_checkpoint, trial, ignore_keys_for_eval",
    "save_model": "output_dir, _internal_call",
    "_save_checkpoint": "model, trial",
    "_save": "output_dir, state_dict",
    "_save_optimizer_and_scheduler": "output_dir",
    "_load_from_checkpoint": "resume_from_checkpoint, model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_save_rng_state": "output_dir",
    "_load_rng_state": "checkpoint",
    "_save_scaler": "output_dir",
    "_load_scaler": "checkpoint",
    "_load_best_model": "",
}

OLDER_HOOKS = {"init_hf_repo": "token"}  # of transformers 5.5


@pytest.mark.parametrize("name", HOOKS)
def test_the_hook_is_as_it_was_when_it_was_overridden(name):
    _, *theirs = inspect.signature(getattr(Trainer, name)).parameters
    assert ", ".join(theirs) in (HOOKS[name], OLDER_HOOKS.get(name))
    _, *ours = inspect.signature(getattr(SafeCheckpoints, name)).parameters
    assert ", ".join(ours) == HOOKS[name]


def test_every_override_is_pinned():
    theirs = set(vars(Trainer))
    overridden = {name for name in vars(SafeCheckpoints) if name in theirs and name[:2] != "__"}
    assert overridden == HOOKS.keys() - {"save_model"}


def test_every_place_where_transformers_pickles_is_overridden_or_out_of_reach():
    places = {
        name
        for name, member in inspect.getmembers(Trainer, inspect.isfunction)
        if "torch.save(" in inspect.getsource(member) or "torch.load(" in inspect.getsource(member)
    }
    # Refused at construction; reached only after the checkpoint proved to hold no pickle; part of
    # hyperparameter_search, which needs a model_init, and our trainers take none.
    out_of_reach = {"_push_from_checkpoint", "_load_from_checkpoint", "_tune_save_checkpoint"}
    assert places - out_of_reach <= set(vars(SafeCheckpoints))
    assert "_save_rng_state" in places


def test_checkpoints_of_transformers_itself_are_refused(tmp_path):
    trainer_in(tmp_path, cls=Trainer, max_steps=2).train()
    with pytest.raises(UsageError, match="not by softpref"):
        trainer_in(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name", "value", "message"),
    [
        (checkpoints.Ranks, "here", lambda _: Ranks(0, 2), "training in several processes"),
        (checkpoints, "is_torch_xla_available", lambda: True, "XLA"),
        (checkpoints, "is_sagemaker_mp_enabled", lambda: True, "SageMaker"),
    ],
)
def test_what_cannot_be_saved_exactly_is_refused(
    tmp_path, monkeypatch, target, name, value, message
):
    monkeypatch.setattr(target, name, value)
    with pytest.raises(UsageError, match=f"^{message}.* is not supported"):
        trainer_in(tmp_path)


def test_hub_pushes_of_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(SafeCheckpoints, "init_hf_repo", lambda self: None)
    with pytest.raises(UsageError, match="hub_strategy='end'"):
        trainer_in(tmp_path, push_to_hub=True)
    trainer_in(tmp_path, push_to_hub=True, hub_strategy="end")


def test_models_that_cannot_save_themselves_are_refused(tmp_path):
    with pytest.raises(UsageError, match="save_pretrained"):
        trainer_in(tmp_path, nn.Linear(2, 2))
