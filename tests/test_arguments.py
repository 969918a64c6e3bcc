"""A mistake's message names arguments in Python and flags on the command line."""

from __future__ import annotations

import re

import pytest

import softpref
from softpref.arguments import as_arguments
from softpref.cli import main
from softpref.errors import UsageError
from softpref.training.config import MSPOConfig
from softpref.training.output import write_lines
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
from tests.toy import toy_pairs

NAMES = {"beta": "beta", "clean": "clean_dataset", "tuning": "tuning", "bf16": "bf16",
         "lora_r": "lora_r", "signals": "signals", "mix": "mix"}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("--beta 0.0: must be above 0.", "beta=0.0: must be above 0."),
        ("set --beta 1e-06.", "set beta=1e-06."),
        ("--tuning full, but; or --tuning lora.", 'tuning="full", but; or tuning="lora".'),
        ("by --clean, or --clean N to hold", "by clean_dataset, or clean_dataset=N to hold"),
        ("--clean row 3 is also", "clean_dataset row 3 is also"),
        ("--clean /a:b/c.jsonl: is gone", 'clean_dataset="/a:b/c.jsonl": is gone'),
        ("set --bf16 true (or --bf16 false)", "set bf16=True (or bf16=False)"),
        ("does not read --lora_*: leave", "does not read lora_*: leave"),
        ("--mix --beta: two", "mix beta: two"),
        ("(softpref env --accelerate gpus)", "(softpref env --accelerate gpus)"),
    ],
)
def test_flags_become_arguments(flags, arguments):
    assert as_arguments(flags, NAMES, {"full", "lora"}) == arguments


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("doors")
    tiny_llama(make_tokenizer(), 0).save_pretrained(home / "sft")
    make_tokenizer().save_pretrained(home / "sft")
    for name, pairs in (("pairs", toy_pairs(20)), ("few", toy_pairs(4, seed=1))):
        write_lines(home / f"{name}.jsonl", pairs)
    write_lines(home / "bad.jsonl", [*toy_pairs(12, seed=2), {"prompt": "a"}])
    return home


def train_in_python(model="sft", train="pairs.jsonl", clean=None, **options):
    softpref.MSPOTrainer(
        model,
        MSPOConfig("out", use_cpu=True, disable_tqdm=True, **options),
        train_dataset=train,
        clean_dataset=clean,
    )


def audit_in_python(model="sft", data="pairs.jsonl", clean=None, **options):
    softpref.audit(model, data, clean, **options)


def as_flags(values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


MISTAKES = {
    "train": [
        (dict(method="mspo"), "{clean}"),
        (dict(method="dpo", clean="few.jsonl"), "few.jsonl"),
        (dict(method="dpo", clean=30), "{clean}"),
        (dict(method="dpo", clean="pairs.jsonl"), "{clean}"),
        (dict(method="dpo", beta=-1.0), "{beta}"),
        (dict(method="dpo", noise_rate=0.2), "{noise_rate}"),
        (dict(method="cdpo"), "{noise_rate}"),
        (dict(method="dpo", tuning="full", lora_r=4), "{tuning}"),
        (dict(method="dpo", train="bad.jsonl"), "{on_bad_row}"),
        (dict(method="dpo", model="nowhere"), "{model}"),
        (dict(method="dpo", train="nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (dict(method="oracle", train="few.jsonl", seed=-1), "{seed}"),
    ],
    "audit": [
        (dict(), "{clean}"),
        (dict(clean="few.jsonl"), "few.jsonl"),
        (dict(clean=30), "{clean}"),
        (dict(clean="pairs.jsonl"), "{clean}"),
        (dict(clean=10, model="nowhere"), "{model}"),
        (dict(clean=10, batch_size=0), "{batch_size}"),
        (dict(clean=10, data="bad.jsonl"), "{on_bad_row}"),
        (dict(run="nowhere"), "{model}"),
        (dict(run="nowhere", model=""), "{run}"),
    ],
}  # fmt: skip
RENAMED = {"train": {"clean": "clean_dataset", "train": "train_dataset"}, "audit": {}}
DEFAULTS = {
    "train": {"model": "sft", "train": "pairs.jsonl", "output": "out", "use_cpu": True},
    "audit": {"model": "sft", "data": "pairs.jsonl", "output": "out"},
}


@pytest.mark.parametrize(
    ("command", "mistake", "named"),
    [(command, *each) for command, mistakes in MISTAKES.items() for each in mistakes],
)
def test_both_doors_name_a_mistake_by_their_own_words(
    command, mistake, named, home, monkeypatch, capsys
):
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    with pytest.raises(UsageError) as told:
        {"train": train_in_python, "audit": audit_in_python}[command](**mistake)
    own = {name: RENAMED[command].get(name, name) for name in re.findall(r"{(\w+)}", named)}
    assert "--" not in str(told.value)
    assert re.search(rf"\b{named.format_map(own)}\b", str(told.value)), told.value
    with pytest.raises(SystemExit) as ended:
        main([command, *as_flags({**DEFAULTS[command], **mistake})])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert named.format_map({name: f"--{name}" for name in own}) in said, said
    assert not (home / "out").exists()
