"""Serve a small chat model as a judge, on this machine and without a GPU.

python examples/local_judge.py MODEL 8000
softpref judge --base_url http://localhost:8000/v1 --judge_model MODEL ...

An OpenAI-compatible server that answers one call at a time, greedily, and holds each reply to the
request's JSON schema: small models seldom keep to one. vLLM, SGLang and llama.cpp do so faster.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LONGEST_STRING = 8
"""Tokens of a string in a reply: a small model's justification takes time, and justifies little."""


class Continued:
    """A prompt that is continued by given text, by one of several texts, or freely."""

    def __init__(self, prompt: str) -> None:
        self.tokens, self._past = 0, None
        self.add(prompt)

    def add(self, text: str) -> None:
        """Continue with this text."""
        self._feed(_ids(text))

    def choose(self, options: list[str]) -> str:
        """Continue with one of these texts and a quote, by the likeliest of their next tokens."""
        left = {option: _ids(f'{option}"') for option in options}
        place = 0
        while len(left) > 1:
            allowed = {ids[place] for ids in left.values()}
            token = max(allowed, key=lambda i: float(self._logits[i]))
            self._feed([token])
            left = {option: ids for option, ids in left.items() if ids[place] == token}
            place += 1
        ((option, ids),) = left.items()
        self._feed(ids[place:])
        return option

    def write(self, longest: int, stop: str = "") -> tuple[str, bool]:
        """Continue freely; return the text before `stop` or EOS, and whether either came."""
        ids: list[int] = []
        while len(ids) < longest:
            token = int(self._logits.argmax())
            text = tokenizer.decode([*ids, token])
            if token == tokenizer.eos_token_id or (stop and stop in text):
                return tokenizer.decode(ids), True
            ids.append(token)
            self._feed([token])
        return tokenizer.decode(ids), False

    def _feed(self, ids: list[int]) -> None:
        if ids:
            inputs = {"input_ids": torch.tensor([ids]), "past_key_values": self._past}
            with torch.inference_mode():
                out = model(**inputs, use_cache=True, logits_to_keep=1)
            self._past, self._logits = out.past_key_values, out.logits[0, -1]
            self.tokens += len(ids)


def _ids(text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def by_schema(text: Continued, properties: dict[str, Any]) -> str:
    """Return an object of strings and enums as JSON; the model reads its skeleton as it goes."""
    found = {}
    for name, kind in properties.items():
        text.add(f'{", " if found else "{"}"{name}": "')
        if "enum" in kind:
            found[name] = text.choose(kind["enum"])
        else:
            found[name] = text.write(LONGEST_STRING, stop='"')[0]
            text.add('"')
    return json.dumps(found)


def completion(request: dict[str, Any]) -> dict[str, Any]:
    """Return the completion of a request."""
    messages = request["messages"]
    text = Continued(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )
    sent, ended = text.tokens, True
    form = request.get("response_format", {}).get("json_schema")
    if form:
        content = by_schema(text, form["schema"]["properties"])
    else:
        content, ended = text.write(request.get("max_tokens", 512))
    received = text.tokens - sent
    message = {"role": "assistant", "content": content}
    finish = "stop" if ended else "length"
    return {
        "id": "0", "object": "chat.completion", "created": 0, "model": request["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": sent, "completion_tokens": received,
                  "total_tokens": sent + received},
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Answers POST /v1/chat/completions."""

    def do_POST(self) -> None:
        """Send a completion."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(completion(request)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


source, port = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
with HTTPServer(("127.0.0.1", int(port)), Handler) as server:
    print(f"{source} at http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
