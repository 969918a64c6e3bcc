"""What the terminal is shown of hostile names, and of secrets."""

from __future__ import annotations

import json
import unicodedata
from contextlib import suppress

import pytest

from softpref.cli import main
from softpref.terminal import printable
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model
from tests.toy import toy_pairs

EVIL = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egnp\ud800"
KEY = "sk-do-not-show-0123456789"


def assert_harmless(text):
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    steering = {
        c for c in text
        if unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c) in turning
    } - {"\n", "\t"}  # fmt: skip
    assert not steering, steering


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MY_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    toy_pairs(12).to_json("train.jsonl")
    toy_pairs(6, 1).to_json("clean.jsonl")
    tiny_model().save_pretrained("model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('" + EVIL[:-1] + "') }}"
    tokenizer.save_pretrained("model")
    return tmp_path


def row(**changes):
    return json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"} | changes) + "\n"


CHAT = [{"role": "user", "content": "a"}]
ANSWERS = {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "a"}],
           "rejected": [{"role": "assistant", "content": "b"}]}  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        [EVIL], ["train", f"--{EVIL}", "1"], ["train", "--config", EVIL],
        ["train", "--config", "evil.yaml"], ["train", "--config", "torn.yaml"],
        ["inject", "--input", "columns.jsonl", "--output", "out.jsonl", "--rate", "0.1"],
        ["inject", "--input", "uids.jsonl", "--output", "out.jsonl", "--rate", "0.1"],
        ["inject", "--input", "chosen.jsonl", "--output", "out.jsonl", "--rate", "0.1"],
        ["train", "--model", "model", "--train", "template.jsonl", "--method", "dpo",
         "--output", "out", "--use_cpu", "true"],
        ["train", "--model", EVIL[:-1], "--train", "train.jsonl", "--output", "out"],
        ["audit", "--model", "model", "--data", "train.jsonl", "--clean", "clean.jsonl",
         "--marks", "marks.jsonl", "--output", "out"],
        ["judge", "--check", "columns.jsonl", "--judge", "checker", "--output", EVIL[:-1]],
        ["judge", "--judge_model", "m", "--check", "uids.jsonl", "--output", KEY,
         "--base_url", KEY],
    ],
    ids=range(13),
)  # fmt: skip
def test_no_way_to_the_terminal_carries_control_characters(files, capsys, arguments):
    (files / "columns.jsonl").write_text(row(**{EVIL: 1, "extra": 2}))
    (files / "uids.jsonl").write_text(row(uid=EVIL) * 2)
    (files / "chosen.jsonl").write_text(row(chosen={EVIL: EVIL}))
    (files / "template.jsonl").write_text(json.dumps(ANSWERS) + "\n")
    (files / "marks.jsonl").write_text(json.dumps({"uid": EVIL, "mark": "right"}) + "\n")
    (files / "evil.yaml").write_text(json.dumps({EVIL[:-1]: 1}))
    (files / "torn.yaml").write_text('"\\e[2J": [')
    with suppress(SystemExit):
        main(arguments)
    said = "".join(capsys.readouterr()).replace("\rLoading weights", "")  # a bar of progress
    assert said
    assert_harmless(said)
    assert KEY not in said


def test_text_for_the_terminal_keeps_what_is_harmless(monkeypatch):
    monkeypatch.setenv("SOME_SECRET", f" {KEY}\n")
    monkeypatch.setenv("SHORT_KEY", "false")
    assert printable("ünïcode 😀\n\ttrue or false") == "ünïcode 😀\n\ttrue or false"
    assert printable(f"\x1b[1m{KEY}\r") == "\\x1b[1m[SOME_SECRET]\\x0d"
    assert_harmless(printable("".join(map(chr, range(0x3000)))))
