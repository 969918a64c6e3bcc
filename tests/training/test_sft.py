import copy
import inspect
import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from softpref.cli import main
from softpref.data.fingerprints import count_sft_targets, target_fingerprint
from softpref.errors import UsageError
from softpref.training import sft
from softpref.training.checkpoints import newest_complete
from softpref.training.sft import SoftprefSFTTrainer, fine_tune
from tests.safe_files import assert_safe_files

WORDS = ["<pad>", "<s>", "</s>", "<user>", "<bot>", *"abcdefgh"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
    "{{ ' </s> ' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            attention_dropout=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def config(directory, **changes):
    arguments = {
        "output_dir": str(directory),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-2,
        "save_steps": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return SFTConfig(**(arguments | changes))


# The completion repeats the prompt's last letter, so there is something to learn. The space is the
# prompt's: TRL joins the two texts as they are.
TEXT = Dataset.from_list(
    [
        {"uid": str(i), "prompt": f"{a} {b} ", "chosen": f"{b} {b}", "rejected": f"{a} {a}"}
        for i, (a, b) in enumerate((a, b) for a in "abcd" for b in "efgh")
    ]
)
MESSAGES = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": row["prompt"].strip()}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in TEXT
    ]
)


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch):
    monkeypatch.setattr(SFTTrainer, "_send_telemetry", lambda self: None)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTTrainer, "_send_telemetry", lambda self: None)
        assert fine_tune(tiny(), tokenizer, TEXT, config(directory)) == directory
    return directory


def test_the_loss_falls(tuned):
    state = json.loads((tuned / "checkpoint-12" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"]]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_model_and_tokenizer_load_from_the_output(tuned):
    model = AutoModelForCausalLM.from_pretrained(tuned)
    last = load_file(tuned / "checkpoint-12" / "model.safetensors")
    assert torch.equal(model.lm_head.weight, last["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, tiny().lm_head.weight)
    assert AutoTokenizer.from_pretrained(tuned)("a e")["input_ids"] == [5, 9]


def test_targets_are_recorded_and_counted(tuned):
    record = json.loads((tuned / "sft_targets.json").read_text())
    assert record["format"] == 1
    assert record["fingerprints"] == sorted(
        target_fingerprint(row["prompt"], row["chosen"]) for row in TEXT
    )
    assert count_sft_targets(str(tuned), TEXT) == 16
    flipped = TEXT.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    assert count_sft_targets(str(tuned), flipped) == 16
    unseen = [{"prompt": "a e ", "chosen": "h", "rejected": "g"}]
    assert count_sft_targets(str(tuned), Dataset.from_list(unseen)) == 0


def test_no_file_is_a_pickle(tuned):
    assert_safe_files(tuned)


@pytest.mark.parametrize(("pairs", "prompt", "answer"), [
    (TEXT, "a e", "e e </s>"),
    (MESSAGES, "<user> a e <bot>", "e e </s>"),
])  # fmt: skip
def test_the_loss_is_on_the_response_only(tmp_path, tokenizer, pairs, prompt, answer):
    seen = []

    class Recording(SoftprefSFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "SoftprefSFTTrainer", Recording)
        fine_tune(tiny(), tokenizer, pairs.select([0]), config(tmp_path, max_steps=1))
    ids, labels = seen[0]["input_ids"][0], seen[0]["labels"][0]
    assert tokenizer.decode(ids) == f"{prompt} {answer}"
    length = len(prompt.split())
    assert (labels[:length] == -100).all()
    assert torch.equal(labels[length:], ids[length:])


TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


class StopAt6(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])])
def test_an_interrupted_run_resumes_exactly(tmp_path, tokenizer, adapter, monkeypatch):
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    logged = []
    train = SoftprefSFTTrainer.train

    def recorded(self, *args, **kwargs):
        done = train(self, *args, **kwargs)
        lines = [
            {k: v for k, v in line.items() if k not in TIMES} for line in self.state.log_history
        ]
        logged.append((lines, done.training_loss))
        return done

    monkeypatch.setattr(SoftprefSFTTrainer, "train", recorded)
    # Lines are of 3 steps and checkpoints of 4: one saves a line that has begun.
    fine_tune(tiny(), tokenizer, TEXT, config(tmp_path / "whole", logging_steps=3), adapter)

    def interrupted(self, *args, **kwargs):
        self.add_callback(StopAt6())
        return train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SoftprefSFTTrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(tiny(), tokenizer, TEXT, config(tmp_path / "cut", logging_steps=3), adapter)
    assert newest_complete(tmp_path / "cut")[0] == tmp_path / "cut" / "checkpoint-4"
    assert not (tmp_path / "cut" / "sft_targets.json").exists()

    again = config(tmp_path / "cut", resume_from_checkpoint=True, logging_steps=3)
    fine_tune(tiny(), tokenizer, TEXT, again, adapter)
    (of_whole, loss), (of_cut, resumed_loss) = logged
    assert resumed_loss == loss
    assert [line.get("num_tokens") for line in of_cut] == [60, 120, 180, 240, None]
    assert of_cut == of_whole
    whole, cut = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_other_data_is_refused_on_resume(tuned, tokenizer):
    again = config(tuned, resume_from_checkpoint=True)
    with pytest.raises(UsageError, match="data was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"):
        fine_tune(tiny(), tokenizer, TEXT.select(range(15)), again)
    with pytest.raises(UsageError, match="data was"):  # another order is another run
        fine_tune(tiny(), tokenizer, TEXT.select(reversed(range(16))), again)


def test_the_hook_of_trl_is_as_it_was_when_it_was_passed_over():
    # SafeCheckpoints comes before SFTTrainer and replaces its `_save_checkpoint`, which only adds
    # a model card. Any other saving hook that TRL overrides must be looked at.
    own = vars(SFTTrainer).keys() & {
        "train", "save_model", "_save", "_save_optimizer_and_scheduler", "_save_rng_state",
        "_load_optimizer_and_scheduler", "_load_rng_state", "_load_best_model", "_save_checkpoint",
    }  # fmt: skip
    assert own == {"_save_checkpoint"}
    assert "model_init" not in inspect.signature(SFTTrainer.__init__).parameters
    source = inspect.getsource(SFTTrainer._save_checkpoint)
    assert source.count("self.") == 4
    assert "self.create_model_card(" in source


def test_nothing_else_imports_trl():
    code = (
        "import sys; sys.modules['trl'] = None;"  # an import of it fails
        "import softpref.training.align, softpref.auditing.audit, softpref.judging.judge,"
        " softpref.judging.compare, softpref.judging.generate, softpref.training.environment,"
        " softpref.models.difficulty, softpref.data.noise"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_model_or_rate_is_another_run(tuned, tokenizer):
    """The same directory does not go on with what it was not begun with."""
    other = tiny()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    for change, model, said in (
        ({"learning_rate": 0.5}, tiny(), "learning_rate was 0.03 and is 0.5"),
        ({}, other, "starting model was"),
    ):
        again = config(tuned, resume_from_checkpoint=True, **change)
        with pytest.raises(UsageError, match=said):
            fine_tune(model, tokenizer, TEXT, again)


# --- what is not finite ---------------------------------------------------------------------------


class Poisoned(SoftprefSFTTrainer):
    """NaN comes into the sixth step: into its loss alone, or one parameter's gradient alone."""

    where, latest = "", None

    def compute_loss(self, model, *args, **kwargs):
        type(self).latest = self
        loss = super().compute_loss(model, *args, **kwargs)
        if self.state.global_step != 5:
            return loss
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if self.where == "loss":
            return loss + float("nan")
        first = next(p for p in model.parameters() if p.requires_grad)
        first.register_hook(lambda gradient: gradient * float("nan"))
        return loss


@pytest.mark.parametrize("clipped", [1.0, 0.0])
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken_nor_logged(
    tmp_path, tokenizer, monkeypatch, where, adapter, clipped
):
    monkeypatch.setattr(sft, "SoftprefSFTTrainer", Poisoned)
    monkeypatch.setattr(Poisoned, "where", where)
    options = config(tmp_path, gradient_accumulation_steps=2, max_grad_norm=clipped)
    with pytest.raises(UsageError, match="step 6: .* not finite.*lower --learning_rate"):
        fine_tune(tiny(), tokenizer, TEXT, options, adapter)
    trainer = Poisoned.latest
    assert trainer.state.global_step == 5
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, trainer.before[name]), name
    losses = [line["loss"] for line in trainer.state.log_history]
    assert len(losses) == 5
    assert min(losses) > 0
    # The last checkpoint is whole, and nothing says that the run is finished.
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".md"] == ["checkpoint-4"]
    (weights,) = (tmp_path / "checkpoint-4").glob("*model.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


def test_a_model_that_says_nan_is_named_in_one_message(tmp_path, tokenizer, capsys):
    broken = tiny()
    with torch.no_grad():
        broken.lm_head.weight[6] = 3e38  # finite, which its logits are not
    broken.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    TEXT.to_json(tmp_path / "train.jsonl")
    with pytest.raises(SystemExit) as stopped:
        main(["sft", "--model", str(tmp_path / "model"), "--train", str(tmp_path / "train.jsonl"),
              "--output", str(tmp_path / "out"), "--save_steps", "1", "--logging_steps", "1",
              "--disable_tqdm", "true"])  # fmt: skip
    assert stopped.value.code == 2
    said = capsys.readouterr()
    (message,) = (line for line in said.err.splitlines() if line.startswith("softpref"))
    assert message.startswith("softpref sft: step 1: the loss or its gradient is not finite.")
    assert "Traceback" not in said.err
    assert " loss " not in said.out
    assert not list((tmp_path / "out").iterdir())


def test_padding_beyond_the_embedding_is_refused_before_training(tokenizer, tmp_path):
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<new>"})
    pairs = Dataset.from_list([{"prompt": "a", "chosen": " b"}])
    config = SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(UsageError, match="'<new>' has the id 13, but the embedding has 13 rows"):
        fine_tune(tiny(), padded, pairs, config)
    assert not (tmp_path / "run").exists()
