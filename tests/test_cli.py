"""The command line as a user meets it: results on disk, and one message for every mistake."""

from __future__ import annotations

import json
import re
import signal
from random import Random

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import softpref
from softpref import cli
from softpref.cli import main
from softpref.world.language import make_tokenizer
from tests.forked import Forked
from tests.progress import finished, wait_for
from tests.tiny import tiny_model
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
    columns = {"uid", "ppl_diff", "soft_label", "p_correct", "evidence", "margin", "step"}
    assert set(labels[0]) == columns
    history = pq.read_table(run / "label_history.parquet")
    assert history.column_names == ["uid", "step", "ppl_diff", "soft_label", "margin"]
    assert len(history) == 16
    record = json.loads((run / "run.json").read_text())
    assert record["data"]["train"]["pairs"] == 40
    assert record["options"]["beta"] == 0.1
    assert record["versions"]["torch"]
    printed = capsys.readouterr().out
    lines = (run / "metrics.jsonl").read_text()
    assert lines.count('"eval_loss"') == 1  # once at the last step
    for said in ("reference:", "noise rate:", "engine:", "steps: 2 of 8 pairs", "written: run"):
        assert said in printed
    assert "---\nlibrary_name: peft" in (run / "README.md").read_text()


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
    main(arguments)
    for name in ("adapter_model.safetensors", "labels.jsonl"):
        assert (files / "run" / name).read_bytes() == (files / "whole" / name).read_bytes()


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_interrupted_after_its_last_step_takes_no_other(files, model, monkeypatch, command):
    from softpref.training import finished, sft

    arguments = {
        "train": train_arguments(model, lr_scheduler_type="constant", max_steps=3),
        "sft": ["sft", "--model", str(model), "--train", "train.jsonl", "--max-steps", "3",
                "--disable-tqdm", "true"],
    }[command]  # fmt: skip

    def dies(*_):
        raise KeyboardInterrupt

    main([*arguments, "--output", "whole"])
    monkeypatch.setattr(finished, "write_lines", dies)
    monkeypatch.setattr(sft, "write_sft_targets", dies)
    with pytest.raises(SystemExit):
        main([*arguments, "--output", "run"])
    assert (files / "run" / "checkpoint-3").is_dir()
    monkeypatch.undo()
    monkeypatch.chdir(files)
    main([*arguments, "--output", "run"])
    names = {path.relative_to(files / "whole") for path in (files / "whole").rglob("*")}
    assert {path.relative_to(files / "run") for path in (files / "run").rglob("*")} == names
    for name in ("adapter_model.safetensors", "model.safetensors", "meta_learner.safetensors",
                 "labels.jsonl", "label_history.parquet"):  # fmt: skip
        if (whole := files / "whole" / name).exists():
            assert (files / "run" / name).read_bytes() == whole.read_bytes(), name


def test_sft_then_train_warns_of_what_sft_has_seen(files, model, capsys):
    arguments = ["--model", str(model), "--train", "train.jsonl", "--output", "sft",
                 "--max-steps", "2", "--disable-tqdm", "true"]  # fmt: skip
    main(["sft", *arguments])
    AutoModelForCausalLM.from_pretrained(files / "sft")
    capsys.readouterr()
    main(train_arguments("sft"))
    assert "responses of 40 of the training pairs" in capsys.readouterr().out


def inject_arguments(**options) -> list[str]:
    merged = {"input": "train.jsonl", "output": "noisy.jsonl"} | options
    given = {k: v for k, v in merged.items() if v is not None}
    return ["inject", *(str(part) for k, v in given.items() for part in (f"--{k}", v))]


def test_inject(files, capsys):
    main(inject_arguments(rate=0.4))
    draw = Random(0)
    flips = sum(draw.random() < 0.4 for _ in range(40))
    assert capsys.readouterr().out == (
        f"noisy.jsonl: {flips} of 40 labels flipped ({flips / 40:.1%}; rate 40.0%, seed 0); the "
        "truth is in is_flipped\n"
    )
    assert len((files / "noisy.jsonl").read_text().splitlines()) == 40
    main([*inject_arguments(rate=0.4, output="quiet.jsonl"), "-q"])
    assert capsys.readouterr().out == ""


def test_inject_writes_over_nothing_that_came_meanwhile(files, monkeypatch, capsys):
    from softpref.data import noise

    write = noise.write_rows

    def writes(*given):
        write(*given)
        (files / "noisy.jsonl").write_text("mine")

    monkeypatch.setattr(noise, "write_rows", writes)
    assert "noisy.jsonl exists" in fails(capsys, inject_arguments(rate=0.4))
    assert (files / "noisy.jsonl").read_text() == "mine"


def test_inject_by_difficulty(files, model, capsys):
    from softpref.models.difficulty import inject_by_difficulty

    main(inject_arguments(input="clean.jsonl", kind="difficulty", model=model, seed=1))
    said = re.fullmatch(
        r"noisy\.jsonl: (\d+) of 16 labels flipped \((.*)%; (\d) of 8 hard pairs, (.*)%, at rate "
        r"40\.0%; (\d) of 8 easy pairs, (.*)%, at rate 10\.0%; hard is an absolute log-ratio "
        r"below (\d+\.\d\d) nats, seed 1\); the truth is in is_flipped\n",
        capsys.readouterr().out,
    )
    flipped, hard, easy = (int(said[group]) for group in (1, 3, 5))
    assert flipped == hard + easy
    shares = (f"{100 * n:.1f}" for n in (flipped / 16, hard / 8, easy / 8))
    assert said.group(2, 4, 6) == tuple(shares)
    rows = [json.loads(line) for line in (files / "noisy.jsonl").read_text().splitlines()]
    assert sum(row["is_flipped"] for row in rows) == flipped
    done = inject_by_difficulty("clean.jsonl", "same.jsonl", str(model), 1)
    assert (files / "same.jsonl").read_bytes() == (files / "noisy.jsonl").read_bytes()
    assert (done.hard.flipped, done.easy.flipped) == (hard, easy)
    other = {"hard-rate": 0.999, "easy_rate": 0, "max-length": 32, "output": "other.jsonl"}
    main(inject_arguments(kind="difficulty", model=model, **other))
    assert "20 of 20 hard pairs, 100.0%, at rate 99.9%; 0 of 20 easy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": None, "rate": 0.4}, "--input is missing"),
        ({"output": None, "rate": 0.4}, "--output is missing"),
        ({}, "--rate is missing: give a share"),
        ({"rate": 1.5}, "--rate 1.5: give a share of pairs in [0, 1)"),
        ({"rate": 0.4, "model": "m"}, "--model: --kind random does not read it; leave it out, or"),
        ({"rate": 0.4, "hard_rate": 0.4}, "--hard_rate: --kind random does not read it"),
        ({"rate": 0.4, "easy_rate": 0}, "--easy_rate: --kind random does not read it"),
        ({"rate": 0.4, "max_length": 9}, "--max_length: --kind random does not read it"),
        ({"rate": 0.4, "trust_remote_code": "true"}, "--trust_remote_code: --kind random does not"),
        ({"kind": "difficulty"}, "--model is missing: give the surrogate"),
        (
            {"kind": "difficulty", "model": "m", "rate": 0},
            "--rate: --kind difficulty does not read",
        ),
        ({"kind": "difficulty", "model": "m", "hard_rate": 1}, "--hard_rate 1.0: give a share"),
        ({"kind": "difficulty", "model": "m", "easy_rate": -0.1}, "--easy_rate -0.1: give a share"),
        ({"kind": "difficulty", "model": "m", "max_length": 1}, "--max_length 1: must be at least"),
        ({"kind": "difficulty", "model": "no/where/at-all"}, "--model no/where/at-all"),
        ({"kind": "difficulty", "model": "m", "output": "train.jsonl"}, "is the input"),
        ({"kind": "difficulty", "model": "m", "output": "clean.jsonl"}, "clean.jsonl exists"),
        ({"kind": "difficulty", "model": "m", "output": "no/a.jsonl"}, "there is no folder no"),
        ({"kind": "hard", "model": "m"}, "hard"),
    ],
)
def test_inject_says_what_is_wrong_and_writes_nothing(options, message, files, capsys):
    before = {path.name: path.read_bytes() for path in files.glob("*.jsonl")}
    assert message in fails(capsys, inject_arguments(**options))
    assert {path.name: path.read_bytes() for path in files.glob("*.jsonl")} == before


def test_inject_stops_at_a_pair_that_is_too_long(files, model, capsys):
    message = fails(capsys, inject_arguments(kind="difficulty", model=model, max_length=9))
    assert (
        "train.jsonl, line 1: longer than --max_length 9: the prompt alone has 9 tokens" in message
    )
    assert not (files / "noisy.jsonl").exists()


def test_flips_in_a_clean_file_are_learned_and_their_truth_is_not_read(files, model):
    """Table 7's noise: `inject` on the clean file; only a clean set that differs trains another."""
    main(inject_arguments(input="clean.jsonl", output="flipped.jsonl", rate=0.4))
    rows = [json.loads(line) for line in (files / "flipped.jsonl").read_text().splitlines()]
    lies = [row | {"is_flipped": not row["is_flipped"]} for row in rows]
    untold = [{k: v for k, v in row.items() if k != "is_flipped"} for row in rows]
    for name, changed in (("lies", lies), ("untold", untold)):
        (files / f"{name}.jsonl").write_text("\n".join(map(json.dumps, changed)))
    written = {}
    for name in ("flipped", "lies", "untold", "clean"):
        main(train_arguments(model, clean=f"{name}.jsonl", output=name, **{"meta-every": 1}))
        files_of = ("adapter_model.safetensors", "meta_learner.safetensors", "labels.jsonl")
        written[name] = [(files / name / file).read_bytes() for file in files_of]
    assert written["flipped"] == written["lies"] == written["untold"]
    assert all(a != b for a, b in zip(written["flipped"], written["clean"], strict=True))


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"softpref {softpref.__version__}\n"
    assert dir(softpref) == softpref.__all__ == sorted(softpref.__all__)
    assert "__version__" in softpref.__all__


def test_help_of_a_command_by_its_name(capsys):
    for arguments in (["help", "env"], ["env", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "softpref env [--config" in capsys.readouterr().out


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
@pytest.mark.parametrize(
    ("command", "flag"),
    [("train", "--seed"), ("sft", "--seed"), ("audit", "--seed"), ("inject", "--seed"),
     ("generate", "--seed"), ("demo", "--seed"), ("judge", "--order_seed"), ("study", "--seeds")],
)  # fmt: skip
def test_a_seed_that_no_generator_takes_is_refused(command, flag, seed, capsys):
    message = fails(capsys, [command, *(["table1"] if command == "study" else []), flag, seed])
    assert f"{flag} {seed}: must be at least 0 and below 4294967296" in message


@pytest.mark.parametrize(
    ("flag", "name"),
    [("--lr", "learning_rate"), ("--batch_size", "per_device_train_batch_size"),
     ("--epochs", "num_train_epochs"), ("--model-name-or-path", "model")],
)  # fmt: skip
def test_what_other_tools_call_an_option_is_understood(flag, name, capsys):
    assert f"did you mean {name!r}" in fails(capsys, ["train", flag, "1"])


def test_help(capsys):
    main(["--help"])
    assert "softpref train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for ours in ("--meta_lr", "--noise_rate", "--clean", "--bf16", "β of the DPO loss"):
        assert ours in said
    assert "--hub_token" not in said
    assert "--meta-lr" not in said
    assert "Unused" not in said
    assert len(said.splitlines()) < 180
    for spelling in ("--help_all", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            main(["train", spelling])
        assert stop.value.code == 0
        everything = capsys.readouterr().out
        assert "--hub_token" in everything
        assert "--meta_lr" in everything


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
        ({"max-length": 4}, "longer than --max_length 4"),
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
    assert "holds something else" in fails(capsys, train_arguments(model))
    assert (files / "run" / "precious.txt").read_text() == "keep me"


def test_checkpoints_of_another_trainer_are_not_written_over(files, model, capsys):
    """They have no manifest; nothing of theirs may be touched."""
    (files / "run" / "checkpoint-500").mkdir(parents=True)
    (files / "run" / "model.safetensors").write_text("precious")
    assert "no complete checkpoint" in fails(capsys, train_arguments(model))
    assert (files / "run" / "model.safetensors").read_text() == "precious"


def test_a_run_that_was_killed_in_its_first_save_begins_anew(files, model):
    (files / "run" / ".partial-checkpoint-1").mkdir(parents=True)
    main(train_arguments(model))
    assert (files / "run" / "run.json").exists()


def test_a_finished_run_is_not_written_over(files, model, capsys):
    main(train_arguments(model))
    before = (files / "run" / "run.json").read_bytes()
    assert "holds a finished run" in fails(capsys, train_arguments(model))
    assert (files / "run" / "run.json").read_bytes() == before


@pytest.mark.parametrize(("command", "last"), [("train", "run.json"), ("sft", "sft_targets.json")])
def test_a_run_that_another_finished_meanwhile_is_not_gone_on_with(
    files, model, monkeypatch, capsys, command, last
):
    from softpref.training import align, output, sft

    def waits(path, process):  # until another process has finished the same run
        path.mkdir()
        (path / last).write_text("{}")
        return output.first_writes(path, process)

    monkeypatch.setattr({"train": align, "sft": sft}[command], "first_writes", waits)
    arguments = {
        "train": train_arguments(model),
        "sft": ["sft", "--model", str(model), "--train", "train.jsonl", "--output", "run"],
    }[command]
    assert "holds a finished run" in fails(capsys, arguments)


def test_a_changed_option_is_refused_with_the_difference_unless_forced(files, model, capsys):
    arguments = train_arguments(model, **{"max-steps": 2, "save-steps": 1})
    main(arguments)
    (files / "run" / "run.json").unlink()  # as if it had been killed before the end
    changed = train_arguments(model, **{"max-steps": 3, "save-steps": 1, "beta": 0.7})
    said = fails(capsys, changed)
    assert "beta was 0.1 and is 0.7" in said
    assert "--force true" in said
    main([*changed, "--force", "true"])
    assert "comes from another run: beta was 0.1" in capsys.readouterr().out
    assert json.loads((files / "run" / "run.json").read_text())["options"]["beta"] == 0.7


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_of_another_length_or_optimizer_is_another_run(files, model, capsys, command):
    arguments = {
        "train": train_arguments(model, **{"save-steps": 1}),
        "sft": ["sft", "--model", str(model), "--train", "train.jsonl", "--output", "run",
                "--max-steps", "2", "--save-steps", "1", "--disable-tqdm", "true"],
    }[command]  # fmt: skip
    main(arguments)
    for last in ("run.json", "sft_targets.json"):
        (files / "run" / last).unlink(missing_ok=True)
    for option, value, said in (
        ("max_steps", "5", "max_steps was 2 and is 5"),
        ("num_train_epochs", "3", "num_train_epochs was 1.0 and is 3.0"),
        ("adam_beta1", "0.5", "adam_beta1 was 0.9 and is 0.5"),
        ("adam_beta2", "0.5", "adam_beta2 was 0.999 and is 0.5"),
        ("optim", "sgd", "and is 'sgd'"),
    ):
        message = fails(capsys, [*arguments, f"--{option}", value])
        assert said in message
        assert ("--force" in message) == (option != "optim")
    assert "does not fit another optim" in fails(
        capsys, [*arguments, "--optim", "sgd", "--force", "true"]
    )
    main([*arguments, "--max-steps", "3", "--force", "true"])
    assert (files / "run" / "checkpoint-3").is_dir()


def test_sigterm_saves_and_the_same_command_goes_on(files, model):
    arguments = train_arguments(model, **{"max-steps": 60, "save-strategy": "no"})
    main([*arguments, "--output", "whole"])
    process = Forked("softpref.cli", *arguments)
    wait_for(lambda: " loss " in process.said, process, every=0.01)  # training is under way
    process.send_signal(signal.SIGTERM)
    code, said = finished(process)
    assert code == 143
    assert "run the same command to resume" in said
    assert [path.name for path in (files / "run").glob("checkpoint-*")]
    assert not (files / "run" / "run.json").exists()
    main(arguments)
    for name in ("adapter_model.safetensors", "labels.jsonl", "meta_learner.safetensors"):
        assert (files / "run" / name).read_bytes() == (files / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("lora_target_modules", "nosuch", "--lora_target_modules: Target modules"),
        ("meta_every", 0, "--meta_every 0: must be at least 1"),
        ("per_device_train_batch_size", 0, "--per_device_train_batch_size 0"),
        ("lr_scheduler_type", "foo", "foo"),
        ("optim", "adamw_8bit", "bitsandbytes"),
    ],
)
def test_what_transformers_refuses_is_one_message_too(files, model, capsys, option, value, said):
    given = {option.replace("_", "-"): value}
    assert said in fails(capsys, train_arguments(model, **given))


def test_bf16_needs_no_further_flag_on_a_cpu(files, model):
    main(train_arguments(model, **{"bf16": "true", "use-cpu": None}))
    assert (files / "run" / "run.json").exists()


@pytest.mark.parametrize("value", ["inf", "nan", "1e38"])
def test_sft_takes_no_rate_that_is_none(files, model, capsys, value):
    arguments = ["sft", "--model", str(model), "--train", "train.jsonl", "--output", "sft"]
    assert f"--learning_rate {float(value)}" in fails(
        capsys, [*arguments, "--learning_rate", value]
    )


def test_sft_refuses_what_it_could_not_learn(files, model, capsys):
    conversation = [{"role": "user", "content": "sort"}]
    answers = [[{"role": "assistant", "content": word}] for word in "ab"]
    row = {"prompt": conversation, "chosen": answers[0], "rejected": answers[1]}
    (files / "talk.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["sft", "--model", str(model), "--output", "sft", "--train"]
    assert "no chat template" in fails(capsys, [*arguments, "talk.jsonl"])
    assert "longer than --max_length 3" in fails(
        capsys, [*arguments, "train.jsonl", "--max_length", "3"]
    )
    assert not (files / "sft").exists()


def test_unknown_command_key_and_yaml(files, model, capsys):
    assert "did you mean 'train'" in fails(capsys, ["trian"])
    (files / "a.yaml").write_text("betta: 1\n")
    assert "unknown key 'betta'; did you mean 'beta'" in fails(
        capsys, [*train_arguments(model), "--config", "a.yaml"]
    )
    (files / "deep.yaml").write_text("beta: " + "[" * 3000)
    assert "not YAML" in fails(capsys, [*train_arguments(model), "--config", "deep.yaml"])
    (files / "long.yaml").write_text("beta: " + "9" * 5000)
    assert "beta" in fails(capsys, [*train_arguments(model), "--config", "long.yaml"])
    (files / "date.yaml").write_text("beta: 2026-01-01")
    assert "beta" in fails(capsys, [*train_arguments(model), "--config", "date.yaml"])
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


def test_a_study_needs_a_target_and_no_seeds(files, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["study", "table1", "--preset", "tiny", "--model", "nowhere", "--train", "noisy.jsonl",
              "--clean", "clean.jsonl", "--test", "clean.jsonl", "--output", "s"])  # fmt: skip
    assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["study", "--output", "s"])
    assert "start with softpref study TARGET" in capsys.readouterr().err
    assert not (files / "s").exists()


def test_a_dry_run_of_train_says_what_it_would_do_and_writes_nothing(files, model, capsys):
    before = sorted(path.name for path in files.iterdir())
    main([*train_arguments(model, output=None), "--dry_run"])
    said = capsys.readouterr().out
    recipe = ("recipe recommended:", "learning_rate 0.0001", "meta_batch_size 8")
    counts = ("train: 40 pairs", "clean: 16 pairs", "steps: 2 of 8 pairs")
    for part in (*counts, *recipe, "memory: ", "time: about"):
        assert part in said
    assert sorted(path.name for path in files.iterdir()) == before


def test_a_dry_run_of_audit_counts_the_pairs(files, model, capsys):
    main(["audit", "--model", str(model), "--data", "train.jsonl", "--clean", "clean.jsonl",
          "--dry_run", "true"])  # fmt: skip
    assert "to score 56 pairs" in capsys.readouterr().out
    assert not (files / "report.html").exists()


def test_a_dry_run_of_a_study_in_the_world_counts_its_runs(files, capsys):
    main(
        ["study", "table1", "--dry_run", "--methods", "dpo", "mspo", "--seeds", "0", "--jobs", "2"]
    )
    said = capsys.readouterr().out
    assert re.search(r"(\d+) runs \(dpo, mspo\) after \d+ preparations .*, in 2 processes", said)
    assert "Nothing was run" in said


def test_log_lines_are_text_and_q_leaves_warnings(files, model, capsys):
    main([*train_arguments(model, eval="eval.jsonl"), "--logging_steps", "1"])
    said = capsys.readouterr()
    assert re.search(
        r"^step 1/2  loss \d\.\d{3}  accuracy +\d+%  labels \d\.\d\d  doubted +\d+%", said.out, re.M
    )
    assert re.search(r"^step 2/2  evaluation  loss \d\.\d{3}  accuracy", said.out, re.MULTILINE)
    assert "{'" not in said.out + said.err
    main([*train_arguments(model, output="quiet", recipe="faithful"), "-q"])
    said = capsys.readouterr()
    assert said.out.startswith("warning: warm-up takes 100 of 2 steps")
    assert "step" not in said.out.splitlines()[-1] or len(said.out.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
     torch.distributed.DistBackendError("NCCL error")],
)  # fmt: skip
def test_a_process_whose_others_are_gone_leaves_the_word_to_them(monkeypatch, capsys, error):
    def fail(_):
        raise error

    waited = []
    monkeypatch.setitem(cli.COMMANDS, "audit", fail)
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = fails(capsys, ["audit", "--model", "m", "--data", "d", "--clean", "c",
                             "--output", "o"])  # fmt: skip
    assert message == "softpref audit: another process ended; its message says why.\n"
    assert waited == [cli.FIRST_PROCESS_LEAD]
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(type(error)):
        main(["audit", "--model", "m", "--data", "d", "--clean", "c", "--output", "o"])


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_of_several_processes_one_says_that_it_was_interrupted(monkeypatch, capsys, rank, said):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "generate", interrupt)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--model", "m", "--prompts", "p", "--output", "o.jsonl"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.count("run the same command to resume") == said
