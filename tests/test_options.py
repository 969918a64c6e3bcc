"""--config: what a YAML file may hold, and that no file can make reading it hang."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

import pytest
from transformers import HfArgumentParser

from softpref.errors import UsageError
from softpref.options import LONGEST_CONFIG, option, parse
from softpref.training.config import MSPOConfig


@dataclass
class Options:
    beta: float = option("", 0.1)
    top_k: int = option("", 1)


def read(path) -> Options:
    (options,) = parse("test", ["--config", str(path)], Options)
    return options


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize("text", ["beta: 0.2\ntop-k: 3\n", "\ufefftop_k: 3\r\nbeta: 2.0e-1"])
def test_options_are_read_in_either_spelling(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert read(tmp_path / "c.yaml") == Options(0.2, 3)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("&a [*a]", "aliases (*a) are not supported; write the value out"),
        ("beta: &b 0.2\ntop_k: *b", "aliases (*b) are not supported"),
        ("x: &x {beta: 1}\n<<: *x", "aliases (*x) are not supported"),
        ("&a {beta: *a}", "aliases (*a) are not supported"),
        (BOMB, "aliases (*a0) are not supported"),
        ("beta: 1\ntop_k: 1\nbeta: 2", "the key 'beta' appears twice"),
        ("beta: {a: 1, a: 2}", "the key 'a' appears twice"),
        ("top-k: 1\ntop_k: 2", "top_k appears in both spellings"),
        ("1: a\n1: b", "appears twice"),
        ("names: [a, null]", "unknown key 'names'"),
        ("beta: [" * 10, "not YAML"),
        ("? [a, b]\n: 1", "write `key: value` lines"),
        ("[beta, 1]", "write `key: value` lines"),
        ("", "write `key: value` lines"),
        ("beta: 1 " + "#" * LONGEST_CONFIG, "too large"),
    ],
)
def test_traps_are_refused_in_one_message_and_at_once(tmp_path, text, part):
    (tmp_path / "c.yaml").write_text(text)
    begin = time.process_time()
    with pytest.raises(UsageError, match=r"--config .*c\.yaml: .*" + re.escape(part)):
        read(tmp_path / "c.yaml")
    assert time.process_time() - begin < 1


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "wide.yaml").write_text("beta: 1", encoding="utf-16")
    for name, part in (
        ("pipe", "is a pipe; write it to a file first"),
        ("zero", "is a device"),
        ("folder", "Is a directory; give a YAML file"),
        ("absent", "No such file or directory; give a YAML file"),
        ("wide", "'utf-8' codec can't decode"),
    ):
        with pytest.raises(UsageError, match=f"--config .*{name}.yaml: .*{part}"):
            read(tmp_path / f"{name}.yaml")


@dataclass
class Texts:
    name: str | None = option("")
    names: list[str] | None = option("")
    count: int = option("", 0)
    share: float = option("", 0.0)
    says: bool = option("", False)
    settings: dict | str | None = option("")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: 2024-05-13", Texts(name="2024-05-13")),
        ("name: 1.10", Texts(name="1.10")),
        ("name: off", Texts(name="off")),
        ("name: 'null'", Texts(name="null")),
        ("name: null\nnames: ~", Texts()),
        ("names: [2024-05-13, 010, no]", Texts(names=["2024-05-13", "010", "no"])),
        ("names:\n- 1.10\n- b", Texts(names=["1.10", "b"])),
        ("count: 010\nshare: 1e-4\nsays: yes", Texts(count=10, share=1e-4, says=True)),
        ("settings: {a: 1.0, b: [true, x]}", Texts(settings='{"a": 1.0, "b": [true, "x"]}')),
    ],
)
def test_a_value_is_read_as_the_text_of_a_flag_is(tmp_path, text, expected):
    (tmp_path / "c.yaml").write_text(text)
    (found,) = parse("test", ["--config", str(tmp_path / "c.yaml")], Texts)
    assert found == expected


def test_numbers_that_only_yaml_knows_and_nulls_in_lists_are_refused(tmp_path):
    for text, part in (
        ("count: 1:30", "invalid int value"),
        ("names: [a, null]", "null is no value"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UsageError, match=part):
            parse("test", ["--config", str(tmp_path / "c.yaml")], Texts)


@dataclass
class Reaching:
    trust_remote_code: bool = option("", False)
    push_to_hub: bool = option("", False)
    api_key_env: str | None = option("")
    base_url: str | None = option("")
    names: list[str] | None = option("")
    shift: float = option("", 0.0)


@pytest.mark.parametrize(
    ("text", "flags", "part"),
    [
        ("trust_remote_code: true", [], "trust_remote_code is not read from a file"),
        ("trust-remote-code: 'yes'", [], "trust_remote_code is not read from a file"),
        ("push_to_hub: true", [], "push_to_hub is not read from a file"),
        ("api_key_env: AWS_SECRET", [], "api_key_env is not read from a file"),
        ("base_url: http://evil/v1", ["--api-key-env", "KEY"], "give --base_url as a flag too"),
        ("base_url: http://evil/v1", ["--api_key_env=KEY"], "give --base_url as a flag too"),
        ("names: [a, --trust_remote_code, 'true']", [], "begins with a hyphen"),
        ("names: ['--api_key_env=AWS_SECRET']", [], "begins with a hyphen"),
    ],
)
def test_what_runs_code_or_sends_secrets_comes_from_flags_alone(tmp_path, text, flags, part):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"--config .*" + re.escape(part)):
        parse("test", ["--config", str(tmp_path / "c.yaml"), *flags], Reaching)


def test_a_config_may_say_what_sends_no_secret(tmp_path):
    text = "trust_remote_code: false\nbase_url: http://localhost/v1\nshift: -1.5e-3\nnames: [a, b]"
    (tmp_path / "c.yaml").write_text(text)
    (found,) = parse("test", ["--config", str(tmp_path / "c.yaml")], Reaching)
    assert found == Reaching(base_url="http://localhost/v1", shift=-1.5e-3, names=["a", "b"])
    flags = ["--api_key_env", "KEY", "--base_url", "http://mine/v1"]
    (found,) = parse("test", ["--config", str(tmp_path / "c.yaml"), *flags], Reaching)
    assert (found.api_key_env, found.base_url) == ("KEY", "http://mine/v1")


@dataclass
class Numbers:
    rate: float = option("", 0.5)
    shares: list[float] | None = option("")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(UsageError, match="--rate .*: must be a finite number"):
        parse("test", [f"--rate={value}"], Numbers)
    with pytest.raises(UsageError, match="--shares .*: must be a finite number"):
        parse("test", [f"--shares={value}"], Numbers)


@pytest.mark.parametrize("name", ["bad-\udcff.jsonl", "a\0b"])
def test_a_name_that_is_no_text_is_refused(name):
    @dataclass
    class Named:
        files: list[str] | None = option("")

    with pytest.raises(UsageError, match=r"--files .*: is not UTF-8 text; rename it"):
        parse("test", ["--files", "good.jsonl", name], Named)


def test_a_parser_of_transformers_reads_the_options_of_train(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--meta_every", "3", "--warm_start", "false"]
    (config,) = HfArgumentParser((MSPOConfig,)).parse_args_into_dataclasses(flags)
    assert (config.meta_every, config.warm_start, config.meta_hidden) == (3, False, 128)
