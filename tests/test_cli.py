"""The command line as a user meets it: results on disk, and one message for every mistake."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from softpref.cli import main
from softpref.world.language import make_tokenizer
from tests.models import tiny_model
from tests.toy import toy_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_model(dtype=torch.float32, attention="sdpa").save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def files(tmp_path, model, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, pairs in {
        "train": toy_pairs(40, flip_every=3),
        "clean": toy_pairs(16, 1),
        "eval": toy_pairs(6, 2),
    }.items():
        pairs.to_json(tmp_path / f"{name}.jsonl")
    return tmp_path


def train_arguments(base, **options) -> list[str]:
    defaults = {
        "model": base, "train": "train.jsonl", "clean": "clean.jsonl", "output": "run",
        "per-device-train-batch-size": 4, "gradient-accumulation-steps": 2, "meta-batch-size": 8,
        "max-steps": 2, "use-cpu": "true", "disable-tqdm": "true",
    }  # fmt: skip
    merged = {k: v for k, v in (defaults | options).items() if v is not None}
    return ["train", *(str(part) for k, v in merged.items() for part in (f"--{k}", v))]


def fails(capsys, arguments) -> str:
    """Run, expect exit code 2 and one message without a traceback; return it."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_train_leaves_a_whole_run(files, model, capsys):
    main(train_arguments(model, eval="eval.jsonl", **{"eval-strategy": "epoch"}))
    run = files / "run"
    for name in ("adapter_model.safetensors", "tokenizer.json", "labels.jsonl",
                 "label_history.parquet", "metrics.jsonl", "run.json", "README.md"):  # fmt: skip
        assert (run / name).is_file(), name
    assert not list(run.rglob("*.bin")) + list(run.rglob("*.pt")) + list(run.rglob("*.partial"))
    labels = [json.loads(line) for line in (run / "labels.jsonl").read_text().splitlines()]
    assert len(labels) == 40
    assert set(labels[0]) == {"uid", "ppl_diff", "soft_label", "p_correct", "margin", "step"}
    history = pq.read_table(run / "label_history.parquet")
    assert history.column_names == ["uid", "step", "ppl_diff", "soft_label", "margin"]
    assert len(history) == 16
    record = json.loads((run / "run.json").read_text())
    assert record["data"]["train"]["pairs"] == 40
    assert record["options"]["beta"] == 0.1
    assert record["versions"]["torch"]
    printed = capsys.readouterr().out
    for said in ("reference:", "noise rate:", "engine:", "steps: 2 of 8 pairs", "written: run"):
        assert said in printed
    assert "---\nbase_model" in (run / "README.md").read_text()


def test_the_trained_adapter_loads_with_peft(files, model):
    from peft import PeftModel

    main(train_arguments(model))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), files / "run")


def test_aligning_from_an_sft_adapter(files, model, capsys):
    main(train_arguments(model, output="first"))
    capsys.readouterr()
    main(train_arguments(files / "first", output="second"))
    assert "with the adapter it came with" in capsys.readouterr().out
    main(train_arguments(files / "first", output="merged", tuning="full"))
    AutoModelForCausalLM.from_pretrained(files / "merged")


def test_clean_pairs_can_be_held_out_with_their_truth_restored(files, model):
    main(train_arguments(model, clean=12))
    record = json.loads((files / "run" / "run.json").read_text())
    assert record["clean_pairs"] == "truth restored"
    assert record["data"]["clean"]["pairs"] == 12
    assert record["data"]["train"]["pairs"] == 28


def test_dpo_needs_no_clean_pairs(files, model):
    main(train_arguments(model, method="dpo", clean=None, **{"meta-batch-size": None}))
    first = json.loads((files / "run" / "labels.jsonl").read_text().splitlines()[0])
    assert first["soft_label"] is None
    assert first["p_correct"] is None


def test_config_file_and_flags_that_override_it(files, model):
    (files / "run.yaml").write_text("beta: 0.2\nmeta-every: 2\nlora_target_modules: [q_proj]\n")
    main([*train_arguments(model, beta=0.3), "--config", "run.yaml"])
    options = json.loads((files / "run" / "run.json").read_text())["options"]
    assert (options["beta"], options["meta_every"]) == (0.3, 2)
    assert options["lora_target_modules"] == ["q_proj"]


def test_an_interrupted_run_goes_on(files, model, monkeypatch):
    from softpref.training.trainer import MSPOTrainer

    arguments = train_arguments(model, **{"max-steps": 4, "save-steps": 1})
    main([*arguments, "--output", "whole"])
    step = MSPOTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MSPOTrainer, "training_step", dies)
    with pytest.raises(SystemExit):
        main(arguments)
    monkeypatch.undo()
    monkeypatch.chdir(files)
    main([*arguments, "--resume_from_checkpoint", "true"])
    for name in ("adapter_model.safetensors", "labels.jsonl"):
        assert (files / "run" / name).read_bytes() == (files / "whole" / name).read_bytes()


def test_sft_then_train_warns_of_what_sft_has_seen(files, model, capsys):
    arguments = ["--model", str(model), "--train", "train.jsonl", "--output", "sft",
                 "--max-steps", "2", "--disable-tqdm", "true"]  # fmt: skip
    main(["sft", *arguments])
    AutoModelForCausalLM.from_pretrained(files / "sft")
    capsys.readouterr()
    main(train_arguments("sft"))
    assert "responses of 40 of the training pairs" in capsys.readouterr().out


def test_inject(files, capsys):
    main(["inject", "--input", "train.jsonl", "--output", "noisy.jsonl", "--rate", "0.4"])
    assert "of 40 labels flipped" in capsys.readouterr().out
    assert len((files / "noisy.jsonl").read_text().splitlines()) == 40


def test_help(capsys):
    main(["--help"])
    assert "softpref train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert "--meta_lr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "--model is missing"),
        ({"model": "nowhere/at-all"}, "--model nowhere/at-all"),
        ({"train": "absent.jsonl"}, "absent.jsonl"),
        ({"clean": "absent.jsonl"}, "absent.jsonl"),
        ({"clean": 0}, "--clean"),
        ({"clean": 40}, "--clean"),
        ({"clean": 9}, "at least 10"),
        ({"clean": "clean.jsonl", "eval": "clean.jsonl"}, "clean.jsonl"),
        ({"meta-batch-size": 17}, "larger than the clean set"),
        ({"betta": 0.1}, "did you mean 'beta'"),
        ({"beta": -1}, "--beta -1.0"),
        ({"beta": "much"}, "much"),
        ({"method": "dpo"}, "dpo does not read it"),
        ({"method": "magic"}, "magic"),
        ({"max-length": 4}, "--max-length is 4"),
        ({"config": "absent.yaml"}, "absent.yaml"),
    ],
)
def test_mistakes_have_one_message(options, message, files, model, capsys):
    assert message in fails(capsys, train_arguments(model, **options))
    assert not (files / "run").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "line 2"),
        ('{"prompt": "sort : a b =", "chosen": "a b"}', "rejected"),
        ('{"prompt": "sort : a b =", "chosen": 3, "rejected": "b"}', "chosen"),
        ('{"prompt": "sort : a b =", "chosen": " ", "rejected": "b"}', "chosen"),
        ('{"prompt": "sort : a b =", "chosen": "b", "rejected": "b"}', "identical"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(line, reason, files, model, capsys):
    lines = (files / "train.jsonl").read_text().splitlines()
    (files / "bad.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]))
    message = fails(capsys, train_arguments(model, train="bad.jsonl"))
    assert "bad.jsonl" in message
    assert "line 2" in message
    assert reason in message
    assert not (files / "run").exists()
    main(train_arguments(model, train="bad.jsonl", **{"on-bad-row": "skip", "max-steps": 1}))
    record = json.loads((files / "run" / "run.json").read_text())
    assert [bad["row"] for bad in record["data"]["train"]["bad_rows"]] == [2]


def test_a_directory_that_holds_another_run_is_refused(files, model, capsys):
    (files / "run").mkdir()
    (files / "run" / "precious.txt").write_text("keep me")
    assert "holds another run" in fails(capsys, train_arguments(model))
    assert (files / "run" / "precious.txt").read_text() == "keep me"


def test_unknown_command_key_and_yaml(files, model, capsys):
    assert "did you mean 'train'" in fails(capsys, ["trian"])
    (files / "a.yaml").write_text("betta: 1\n")
    assert "unknown key 'betta'; did you mean 'beta'" in fails(
        capsys, [*train_arguments(model), "--config", "a.yaml"]
    )
    (files / "b.yaml").write_text("just text")
    assert "key: value" in fails(capsys, [*train_arguments(model), "--config", "b.yaml"])


def test_conversations_without_a_template_and_tokenizers_without_eos(files, model, capsys):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in toy_pairs(12)
    ]
    (files / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "chat template" in fails(capsys, train_arguments(model, train="chat.jsonl"))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tiny_model(dtype=torch.float32).save_pretrained(files / "endless")
    tokenizer.save_pretrained(files / "endless")
    assert "EOS" in fails(capsys, train_arguments(files / "endless"))


def test_a_warm_up_longer_than_half_the_run_is_warned_of(files, model, capsys):
    main(train_arguments(model, recipe="faithful", **{"gradient-accumulation-steps": 2}))
    assert "warm-up takes 100 of 2 steps" in capsys.readouterr().out
