"""Damaged files and full disks: the previous good state survives, and the message says so."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import subprocess

import pytest
import torch

from softpref.cli import main
from softpref.data.column_cache import ColumnCache
from softpref.training.checkpoints import newest_complete

COLUMNS = {"a": torch.arange(5.0), "b": torch.linspace(-1, 1, 5).double()}


def train(output="run", **options):
    usual = {
        "model": "model", "train": "train.jsonl", "clean": "clean.jsonl", "output": output,
        "tuning": "full", "max_steps": 4, "save_steps": 2, "meta_batch_size": 8,
        "use_cpu": "true", "disable_tqdm": "true",
    } | options  # fmt: skip
    main(["train", *(str(part) for k, v in usual.items() for part in (f"--{k}", v))])


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_damage_to_any_file_of_a_checkpoint_is_seen_and_the_one_before_is_taken(files):
    train()
    draw = random.Random(0)
    newest, before = (files / "run" / f"checkpoint-{step}" for step in (4, 2))
    names = [p.relative_to(newest) for p in newest.rglob("*") if p.is_file()]
    assert len(names) > 8
    for name in names:
        whole = (newest / name).read_bytes()
        for damage in ("flip", "truncate", "remove"):
            if damage == "flip" and name.name == "manifest.json":
                continue  # which of its bytes matter is test_checkpoints.py's to say
            if damage == "flip":
                flip(newest / name, draw.randrange(len(whole)))
            elif damage == "truncate":
                (newest / name).write_bytes(whole[: draw.randrange(len(whole))])
            else:
                (newest / name).unlink()
            found, skipped = newest_complete(files / "run")
            assert found == before, f"{damage} of {name}"
            assert [path for path, _ in skipped] == [newest]
            assert name.name in skipped[0][1]
            (newest / name).write_bytes(whole)
    assert newest_complete(files / "run") == (newest, [])


def test_a_manifest_names_files_of_its_own_checkpoint_alone(tmp_path):
    step = tmp_path / "checkpoint-3"
    step.mkdir()
    (tmp_path / "outside.json").write_text("{}")
    seal = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    for name in ("../outside.json", str(tmp_path / "outside.json"), ".", "[" * 5000):
        (step / "manifest.json").write_text(json.dumps({"format": 1, "files": {name: seal}}))
        ((_, reason),) = newest_complete(tmp_path)[1]
        assert "is missing" in reason


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(files, caplog):
    train("whole")
    train("run")
    (files / "run" / "run.json").unlink()
    flip(files / "run" / "checkpoint-4" / "model.safetensors", -1)
    with caplog.at_level(logging.INFO, "softpref"):
        train("run")
    assert "checkpoint-4 is skipped: model.safetensors is damaged" in caplog.text
    assert "resuming from run/checkpoint-2" in caplog.text
    for name in ("model.safetensors", "labels.jsonl"):
        assert (files / "run" / name).read_bytes() == (files / "whole" / name).read_bytes()


def test_no_damage_to_a_cache_goes_unseen(tmp_path):
    cache, path = ColumnCache(str(tmp_path)), tmp_path / "part.safetensors"
    cache.write("part", COLUMNS)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for damaged in (
            whole[:at],
            whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :],
        ):
            path.write_bytes(damaged)
            found = cache.read("part", list(COLUMNS), 5)
            assert found is None or all(torch.equal(found[n], COLUMNS[n]) for n in COLUMNS)
    path.write_bytes(whole)
    assert cache.read("part", list(COLUMNS), 5) is not None


def test_a_damaged_reference_is_made_again(files):
    train("first")
    caches = list((files / "cache").rglob("*.safetensors"))
    assert caches
    for cache in caches:
        flip(cache, -3)
    train("second")
    for name in ("model.safetensors", "labels.jsonl"):
        assert (files / "first" / name).read_bytes() == (files / "second" / name).read_bytes()


@pytest.fixture
def mounted(tmp_path):
    """A file system of 1.5 MB, or read-only."""
    points = []

    def mount(*options):
        point = tmp_path / f"mount-{len(points)}"
        point.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", point], capture_output=True
        )
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", "-l", point], check=False)


def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_to_do(files, mounted, capsys):
    train("whole", max_steps=30, save_steps=1)
    size = sum(p.stat().st_size for p in (files / "whole" / "checkpoint-1").rglob("*"))
    disk = mounted(f"size={int(3.5 * size)}")
    with pytest.raises(SystemExit) as end:
        train(disk / "run", max_steps=30, save_steps=1)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "run the same command to resume" in message
    assert newest_complete(disk / "run")[0] is not None
    shutil.copytree(disk / "run", files / "moved")  # to a disk with room
    train("moved", max_steps=30, save_steps=1)
    assert (files / "moved" / "model.safetensors").read_bytes() == (
        files / "whole" / "model.safetensors"
    ).read_bytes()


def test_an_output_that_cannot_be_written_is_named(files, mounted, capsys):
    disk = mounted("ro")
    for arguments in (
        ["train", "--model", "model", "--train", "train.jsonl", "--clean", "clean.jsonl",
         "--output", str(disk / "run"), "--use_cpu", "true", "--max_steps", "1"],
        ["audit", "--model", "model", "--data", "train.jsonl", "--clean", "clean.jsonl",
         "--output", str(disk / "audit")],
        ["inject", "--input", "train.jsonl", "--output", str(disk / "noisy.jsonl"),
         "--rate", "0.4"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert "Read-only file system" in message
        assert str(disk) in message
    assert os.listdir(disk) == []


def test_a_full_temporary_directory_is_named(files, mounted, monkeypatch, capsys):
    row = {"prompt": "sort : a b =", "chosen": "a b", "rejected": "b a " * 200}
    with (files / "long.jsonl").open("w") as file:
        file.writelines(json.dumps(row | {"uid": str(i)}) + "\n" for i in range(2000))
    disk = mounted("size=256k")
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    with pytest.raises(SystemExit) as end:
        main(["audit", "--model", "model", "--data", "long.jsonl", "--clean", "10",
              "--output", "out"])  # fmt: skip
    assert end.value.code == 2
    assert f"{disk} (TMPDIR)" in capsys.readouterr().err
    assert not (files / "out").exists()
