"""A judge behind a real OpenAI-compatible server: `transformers serve` with a tiny model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from softpref.judging.ask import ask_judge, make_judge
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeOptions
from softpref.judging.questions import Comparison
from tests.progress import wait_for

VERDICT = '{"justification":"So_it_is.","verdict":"A"}'
WORDS = ("<pad>", "<s>", "</s>", "<unk>", VERDICT, "I", "prefer", "A")


def save_model(home: Path, says: list[str]) -> None:
    """Fit a tiny Llama to say the same whatever it is asked."""
    words = WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}<s>"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32,
                    num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=2048,
                    bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )  # fmt: skip
    answer = torch.tensor([WORDS.index(word) for word in [*says, "</s>"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        question = torch.randint(3, len(WORDS), (8, 40))
        ids = torch.cat([question, torch.ones(8, 1).long(), answer.expand(8, -1)], 1)
        labels = ids.clone()
        labels[:, :41] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except OSError:
        return False


@pytest.fixture
def serve(tmp_path):
    processes = []

    def start(says: list[str]) -> tuple[str, str]:
        home = tmp_path / f"model-{len(processes)}"
        save_model(home, says)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [Path(sys.executable).parent / "transformers", "serve", "--host", "127.0.0.1",
             "--port", str(port), "--device", "cpu"],
            env=os.environ | {"HF_HOME": str(cache)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        processes.append(process)
        wait_for(lambda: is_up(f"http://127.0.0.1:{port}/health"), process, every=0.2)
        return f"http://127.0.0.1:{port}/v1", str(home)

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("says", "results", "failures"),
    [([VERDICT], {"tie"}, {}), (["I", "prefer", "A"], {"failed"}, {"no verdict": 4})],
)
def test_a_real_server_is_asked_and_its_words_are_read(serve, tmp_path, says, results, failures):
    url, model = serve(says)
    options = JudgeOptions(judge_model=model, base_url=url, concurrency=2, max_reply_tokens=20)
    comparisons = [Comparison(str(i), f"Q{i}?", "one", "two") for i in range(2)]
    with VerdictLog(tmp_path / "verdicts.jsonl") as log:
        judged = ask_judge(comparisons, make_judge(options), options, log)
    assert {outcome.result for outcome in judged.outcomes} == results
    assert judged.failures == failures
    assert all(outcome.flipped for outcome in judged.outcomes) == (not failures)
    assert judged.input_tokens > 100
    if not failures:
        assert {answer.justification for answer in log.answers.values()} == {"So_it_is."}
