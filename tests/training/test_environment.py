"""`softpref env` says what is here."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from softpref.cli import main
from softpref.errors import UsageError
from softpref.training.environment import EnvOptions, accelerate_config, run_env
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model


def test_versions_devices_and_ways(capsys):
    main(["env"])
    said = capsys.readouterr().out
    for name in ("python", "softpref", "torch", "transformers", "accelerate", "cpu", "attention"):
        assert any(line.startswith(f"{name} ") for line in said.splitlines()), name
    assert version("torch") in said
    assert "torchrun --nproc_per_node" in said


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_model_is_tried(tuning, tmp_path, capsys):
    tokenizer = make_tokenizer()
    model = tiny_model(dtype=torch.float32, attention="sdpa", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    run_env(EnvOptions(model=str(tmp_path / "model"), tuning=tuning))
    said = capsys.readouterr().out
    assert "layout         prompts shared" in said
    assert "engine         kept, one pass for all pairs" in said
    assert not (tmp_path / "env").exists()


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="--model /no/where: no such directory"):
        run_env(EnvOptions(model="/no/where"))


@pytest.mark.parametrize(("name", "processes"), [("one_gpu", 1), ("gpus", 8), ("machines", 16)])
def test_accelerate_reads_the_configs(name, processes, tmp_path, capsys):
    main(["env", "--accelerate", name])
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert path.read_text() == accelerate_config(name)
    config = load_config_from_file(str(path))
    assert config.num_processes == processes
    assert not config.use_cpu
