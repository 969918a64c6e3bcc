"""Every example runs, on a tiny model and few pairs."""

from __future__ import annotations

import json
import runpy
import sys
import threading
import time
from pathlib import Path

import matplotlib
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as FromBytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from softpref.cli import main
from tests.tiny import tiny_model

EXAMPLES = Path(__file__).parent.parent / "examples"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, so that any text can be read."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = FromBytes()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        chat_template=TEMPLATE, padding_side="left",
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    tokenizer = bytes_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=256)
    tiny_model(dtype=torch.float32, attention="sdpa", **sizes).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return str(home)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(number: int, is_wrong: bool = False) -> dict:
    right, wrong = f" It is {number}, and that is all.", " No."
    chosen, rejected = (wrong, right) if is_wrong else (right, wrong)
    return {"prompt": f"Number {number}?", "chosen": chosen, "rejected": rejected}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Pairs, trusted pairs and test pairs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return [
        write(tmp_path / "pairs.jsonl", [pair(i, i % 4 == 0) for i in range(32)]),
        write(tmp_path / "trusted.jsonl", [pair(i) for i in range(40, 64)]),
        write(tmp_path / "test.jsonl", [pair(i) for i in range(70, 76)]),
    ]


def run(monkeypatch, capsys, script: str, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return capsys.readouterr().out


def test_audit_prints_the_flipped_pairs(files, model, monkeypatch, capsys):
    printed = run(monkeypatch, capsys, "audit.py", model, *files[:2]).splitlines()
    assert printed[0].endswith(" of 32")
    rows = [int(line.split(":")[0].removeprefix("row ")) for line in printed[1:]]
    assert len(rows) == 5
    assert all((row - 1) % 4 == 0 for row in rows)


def test_align_and_compare_prints_both_methods(files, model, monkeypatch, capsys):
    printed = run(monkeypatch, capsys, "align_and_compare.py", model, *files, "out")
    for method in ("dpo", "evidence"):
        assert f"{method}: prefers the right response in" in printed
        assert f"| {method} " in printed
    assert len(Path("out/evidence.jsonl").read_text().splitlines()) == 6


def test_own_judge_counts_its_verdicts(files, monkeypatch, capsys):
    answers = {"ours": "One of each.", "theirs": "More more more."}
    paths = [
        write(Path(f"{name}.jsonl"), [{"prompt": f"{i}?", "response": said} for i in range(30)])
        for name, said in answers.items()
    ]
    printed = run(monkeypatch, capsys, "own_judge.py", files[2], *paths, "out")
    assert "right in 0.0% of 6 known pairs, ties in 0.0%" in printed
    assert "wins 30, losses 0, ties 0" in printed
    assert len(Path("out/verdicts.jsonl").read_text().splitlines()) == 36


def test_local_judge_holds_replies_to_the_schema(files, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["local_judge.py", model, "0"])
    script = str(EXAMPLES / "local_judge.py")
    # Not as __main__, which it would stay: new processes would import the server instead of work.
    server = threading.Thread(target=runpy.run_path, args=(script, None, "served"), daemon=True)
    server.start()
    printed = ""
    while "/v1" not in printed:
        time.sleep(0.1)
        assert server.is_alive()
        printed += capsys.readouterr().out
    address = ["--base_url", printed.split()[-1]]
    main(["judge", "--check", files[2], "--judge_model", "m", "--output", "out", *address])
    verdicts = [json.loads(line) for line in Path("out/verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 12
    assert {row["verdict"] for row in verdicts} <= {"A", "B", "tie"}
    assert all(row["input_tokens"] > row["output_tokens"] > 0 for row in verdicts)
    main(["generate", "--prompts", files[2], "--model", "m", "--prompt_format", "chat", "--output",
          "out.jsonl", "--max_new_tokens", "4", *address])  # fmt: skip
    assert len(Path("out.jsonl").read_text().splitlines()) == 6


def test_the_notebook_runs_from_top_to_bottom(model, tmp_path, monkeypatch, capsys):
    matplotlib.use("agg")
    monkeypatch.setenv("MODEL", model)
    monkeypatch.setenv("OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = json.loads((EXAMPLES / "softpref.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    names: dict = {}
    for cell in cells:
        if "install" not in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)  # noqa: S102
    printed = capsys.readouterr().out
    assert float(printed.split("against the truth: ")[1].split()[0]) > 0.9
    assert "evidence -> " in printed
